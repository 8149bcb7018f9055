"""What stages that compute with torch can be told; apart, so the command line needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.errors import UsageError
from device_runtime.package_format.strict_json import MAX_INTEGER

DEVICES = ("auto", "cpu", "cuda")
METHODS = ("awq", "rtn")
GROUP_SIZES = (128, 64, 32)
"""Group sizes that the kernels know, best compression first."""

MAX_CALIBRATION_TOKENS = 1 << 26
"""256 times the default: their states take 1 TiB in a model of 4096 channels, in fp32."""


@dataclass(frozen=True)
class CalibrateOptions:
    """How statistics are gathered; the defaults are those of ``lite calibrate`` (spec section 5.6).

    Attributes:
        dataset: ptb, wikitext2, c4, pileval, builtin or the path of a text, jsonl or parquet file.
        num_samples: windows drawn from the calibration set.
        seqlen: tokens of one window.
        device: auto takes a GPU where there is one.
        seed: of Python's ``random`` (spec section 4.1 uses 0).
        devices: GPU numbers in place of ``device``; the first one calibrates.
    """

    dataset: str = "ptb"
    num_samples: int = 128
    seqlen: int = 2048
    device: str = "auto"
    seed: int = 0
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: a count below 1, more tokens than there is room for, a seed that no manifest
                holds, or an unknown device.
        """
        check_at_least_one("calib-samples", self.num_samples)
        check_at_least_one("calib-seqlen", self.seqlen)
        num_tokens = self.num_samples * self.seqlen
        if num_tokens > MAX_CALIBRATION_TOKENS:
            raise UsageError(
                f"calib-samples {self.num_samples} x calib-seqlen {self.seqlen} are {num_tokens} "
                f"tokens, expected at most {MAX_CALIBRATION_TOKENS}; ask for fewer or shorter "
                f"windows"
            )
        if abs(self.seed) > MAX_INTEGER:
            raise UsageError(f"seed is {self.seed}, expected at most {MAX_INTEGER}")
        check_choice("device", self.device, DEVICES)
        check_devices(self.devices)


@dataclass(frozen=True)
class QuantizeOptions:
    """How weights become 4-bit codes; the defaults are those of ``lite auto_awq``.

    Attributes:
        w_bits: bits of a weight; 4 is what the kernels know.
        group_size: inputs that share a scale and a zero.
        method: awq, or rtn (round to nearest: no calibration, the baseline to beat).
        device: auto takes a GPU where there is one.
        devices: GPU numbers in place of ``device``; the linears of a layer are searched on all of
            them at once, the first two run the forward passes.
        keep_fp16: patterns of linears that stay fp16, such as ``layers.0.*`` or ``*.down``.
    """

    w_bits: int = 4
    group_size: int = 128
    method: str = "awq"
    device: str = "auto"
    devices: tuple[str, ...] = ()
    keep_fp16: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: another number of bits, or an unknown method, group size or device.
        """
        if self.w_bits != 4:
            raise UsageError(f"w-bits is {self.w_bits}, only 4 can be quantized and run")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(f"w-group-size is {self.group_size}, choose 128, 64 or 32")
        check_choice("method", self.method, METHODS)
        check_choice("device", self.device, DEVICES)
        check_devices(self.devices)


@dataclass(frozen=True)
class EvaluateOptions:
    """What perplexity is measured on.

    Attributes:
        dataset: wikitext2, ptb, builtin or the path of a text, jsonl or parquet file.
        num_samples: windows from the start of the text, one after another.
        seqlen: tokens of one window.
        device: where a checkpoint runs; a package runs through the device engine.
        quant_policy: KV format of packages: 0 fp16, 4 static int8, 8 online int8; None for
            config.ini's.
    """

    dataset: str = "wikitext2"
    num_samples: int = 16
    seqlen: int = 1024
    device: str = "auto"
    quant_policy: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: a count below 1, a window of one token, an unknown device or KV format.
        """
        check_at_least_one("samples", self.num_samples)
        if self.seqlen < 2:
            raise UsageError(f"seqlen is {self.seqlen}, a prediction needs at least 2 tokens")
        check_choice("device", self.device, DEVICES)
        if self.quant_policy not in (None, 0, 4, 8):
            raise UsageError(
                f"quant-policy is {self.quant_policy}, choose 0 (fp16), 4 (static int8) or "
                f"8 (online int8)"
            )


def parse_devices(text: str) -> tuple[str, ...]:
    """Return the devices of a list with commas between them; none for an empty text."""
    return tuple(name.strip() for name in text.split(",")) if text.strip() else ()


def check_devices(devices: tuple[str, ...]) -> None:
    """Refuse a list of devices that is none; whether they are there is seen when they are used.

    Raises:
        UsageError: one is neither a number nor ``cpu``, or both kinds are listed.
    """
    is_number = [name.isascii() and name.isdecimal() for name in devices]
    if not all(is_number) and set(devices) != {"cpu"}:
        raise UsageError(
            f"devices is {','.join(devices)!r}, name the numbers of GPUs with commas between them"
        )


def check_at_least_one(name: str, value: int) -> None:
    """Refuse a count below 1.

    Raises:
        UsageError: the count is below 1.
    """
    if value < 1:
        raise UsageError(f"{name} is {value}, expected at least 1")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among the choices.

    Raises:
        UsageError: the word is not among the choices.
    """
    if value not in choices:
        raise UsageError(f"{name} is {value!r}, choose one of {', '.join(choices)}")
