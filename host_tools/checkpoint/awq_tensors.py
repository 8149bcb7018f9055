"""AWQ gemm tensors of a checkpoint: names, detection, shapes, unpacking (spec section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from device_runtime.errors import PackageError
from device_runtime.package_format import int4
from device_runtime.package_format.names import QWEIGHT
from host_tools.checkpoint.linear_weights import QuantizedLinear
from host_tools.checkpoint.tensor_files import TensorFiles

QZEROS = "qzeros"
SCALES = "scales"
BITS = 4


def quantization_config(group_size: int) -> dict[str, object]:
    """Return the ``quantization_config`` that transformers, vLLM and LMDeploy read."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
    }


def find_group_size(config: Mapping[str, object], files: TensorFiles) -> int:
    """Return the group size of an AWQ checkpoint, 0 for a floating-point one.

    LMDeploy 0.2.3 writes AWQ tensors without a ``quantization_config``, so the tensors decide and
    a config that is there must agree.

    Raises:
        PackageError: another quantization method or variant, or config and tensors disagree.
    """
    section = config.get("quantization_config")
    if section is not None:
        if not isinstance(section, dict):
            raise PackageError("config.json says a quantization_config that is no object")
        _check_variant(section)
    sizes = set()
    for name in files:
        if name.endswith(f".{QWEIGHT}"):
            sizes.add(_group_size_of(name.removesuffix(f".{QWEIGHT}"), files))
    if len(sizes) > 1:
        raise PackageError(f"the checkpoint mixes group sizes {sorted(sizes)}, expected one")
    found = sizes.pop() if sizes else 0
    if section is None:
        return found
    stated = section.get("group_size", section.get("q_group_size"))
    if stated != found:
        raise PackageError(
            f"config.json says group_size {str(stated)[:20]}, the tensors have {found}"
        )
    return found


def read_quantized(
    files: TensorFiles, module: str, group_size: int, bias: torch.Tensor | None
) -> QuantizedLinear:
    """Unpack one linear of an AWQ checkpoint.

    Raises:
        PackageError: a scale is not finite in fp16.
    """
    scales = files.tensor(f"{module}.{SCALES}").to(torch.float16)
    if not torch.isfinite(scales).all():
        raise PackageError(f"{module}.{SCALES} holds a scale that fp16 cannot, quantize again")
    return QuantizedLinear(
        codes=_unpack(files.tensor(f"{module}.{QWEIGHT}")),
        zeros=_unpack(files.tensor(f"{module}.{QZEROS}")),
        scales=scales,
        group_size=group_size,
        bias=bias,
    )


def check_quantized(
    files: TensorFiles, module: str, outputs: int, inputs: int, group_size: int
) -> list[str]:
    """Check dtypes and shapes of one quantized linear and return its tensor names.

    Raises:
        PackageError: a tensor is missing, or its dtype or shape is another one.
    """
    groups = inputs // group_size
    words = outputs // int4.CODES_PER_WORD
    expected = (
        (f"{module}.{QWEIGHT}", (torch.int32,), (inputs, words)),
        (f"{module}.{QZEROS}", (torch.int32,), (groups, words)),
        (f"{module}.{SCALES}", (torch.float16, torch.bfloat16, torch.float32), (groups, outputs)),
    )
    for name, dtypes, shape in expected:
        if name not in files:
            raise PackageError(f"tensor {name} is missing, fetch or quantize the checkpoint again")
        dtype, found = files.facts(name)
        if dtype not in dtypes or found != shape:
            raise PackageError(
                f"tensor {name} is {dtype} {list(found)}, config.json means {dtypes[0]} "
                f"{list(shape)}"
            )
    return [name for name, _, _ in expected]


def _group_size_of(module: str, files: TensorFiles) -> int:
    if f"{module}.{SCALES}" not in files:
        raise PackageError(
            f"tensor {module}.{SCALES} is missing beside {QWEIGHT}, quantize the checkpoint again"
        )
    _, codes = files.facts(f"{module}.{QWEIGHT}")
    _, scales = files.facts(f"{module}.{SCALES}")
    if len(codes) != 2 or len(scales) != 2 or not scales[0] or codes[0] % scales[0]:
        raise PackageError(
            f"{module} has {QWEIGHT} {list(codes)} and {SCALES} {list(scales)}, "
            f"which is no AWQ gemm pair"
        )
    return codes[0] // scales[0]


def _check_variant(section: Mapping[str, object]) -> None:
    method = str(section.get("quant_method", "awq"))
    if method != "awq":
        raise PackageError(
            f"the checkpoint is quantized with {method[:40]}, turbojet reads awq; "
            f"use the floating-point checkpoint"
        )
    version = str(section.get("version", "gemm")).lower()
    bits = section.get("bits", section.get("w_bit", BITS))
    if version != "gemm" or bits != BITS or section.get("zero_point", True) is not True:
        raise PackageError(
            f"the checkpoint is awq {version[:20]} with {str(bits)[:10]} bits and zero_point "
            f"{str(section.get('zero_point', True))[:10]}, turbojet reads gemm with {BITS} bits "
            f"and zero points"
        )


def _unpack(words: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(int4.unpack_awq(words.numpy()))
