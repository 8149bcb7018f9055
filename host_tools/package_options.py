"""What the stages that make a package can be told: convert, kv-qparams, pack and build."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.model_config import HeadType
from device_runtime.package_format.names import check_package_name
from host_tools.fetch.options import FetchOptions
from host_tools.options import (
    GROUP_SIZES,
    METHODS,
    CalibrateOptions,
    check_at_least_one,
    check_choice,
)

ALL_TARGETS = "all"
KERNELS_AUTO = "auto"
"""Compile the CUDA kernels of the target boards."""
KERNELS_NONE = "none"
"""Pack no CUDA kernels."""

LMDEPLOY = "lmdeploy"
ENGINES = ("turbojet", LMDEPLOY)
"""For whom ``convert`` writes; a workspace for LMDeploy runs here as well."""

HEADS: tuple[HeadType, ...] = get_args(HeadType)

BUILD_METHODS = (*METHODS, "none")
"""How ``build`` treats the weights; none leaves them in fp16."""


@dataclass(frozen=True)
class ConfigValues:
    """What LMDeploy's tutorials edit by hand in config.ini (spec section 3).

    None leaves the choice: ``convert`` then writes v0.2.3's value, ``build`` plans one for the
    target boards.

    Attributes:
        quant_policy: KV cache format: 0 fp16, 4 int8 with the package's scales, 8 int8 online.
        cache_max_entry_count: share of the memory that is free after loading, or a number of pages
            when 1 or more.
        cache_block_seq_len: tokens of one KV page.
        cache_chunk_size: pages per allocation; -1 all at once.
        session_len: most tokens of one conversation.
        max_batch_size: sequences decoded together.
    """

    quant_policy: int | None = None
    cache_max_entry_count: float | None = None
    cache_block_seq_len: int | None = None
    cache_chunk_size: int | None = None
    session_len: int | None = None
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: a value is outside its range.
        """
        if self.quant_policy not in (None, 0, 4, 8):
            raise UsageError(
                f"quant-policy is {self.quant_policy}, choose 0 (fp16), 4 (static int8) or "
                "8 (online int8)"
            )
        if self.cache_max_entry_count is not None and not 0 < self.cache_max_entry_count < math.inf:
            raise UsageError(
                f"cache-max-entry-count is {self.cache_max_entry_count:g}, expected a share of the "
                "free memory below 1 or a number of pages"
            )
        if self.cache_block_seq_len is not None and (
            self.cache_block_seq_len < 64 or self.cache_block_seq_len % 64
        ):
            raise UsageError(
                f"cache-block-seq-len is {self.cache_block_seq_len}, expected a multiple of 64"
            )
        if self.cache_chunk_size is not None and self.cache_chunk_size < -1:
            raise UsageError(
                f"cache-chunk-size is {self.cache_chunk_size}, expected -1 (all at once), 0 or more"
            )
        if self.session_len is not None:
            check_at_least_one("session-len", self.session_len)
        if self.max_batch_size is not None:
            check_at_least_one("max-batch-size", self.max_batch_size)


@dataclass(frozen=True)
class ConvertOptions:
    """How a checkpoint becomes a workspace.

    Attributes:
        model_name: the package's name; where it is a name of LMDeploy's templates, also that.
        tp: ranks the files are split for, a power of two.
        group_size: what a 4-bit checkpoint must have; 0 takes what it says.
        template: name of a built-in chat template; empty takes the model's own, else its family's.
        config: values of config.ini.
        head: fp16 leaves the output head as it is; int8 gives it codes with a scale for each row.
        engine: lmdeploy adds the files that LMDeploy 0.1 to 0.5.3 want beside the weights, and
            refuses what it cannot run.
    """

    model_name: str
    tp: int = 1
    group_size: int = 0
    template: str = ""
    config: ConfigValues = ConfigValues()
    head: HeadType = "fp16"
    engine: str = "turbojet"

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: no name for a folder, tp no power of two, an unknown group size, head or
                engine.
        """
        try:
            check_package_name(self.model_name)
        except PackageError as error:
            raise UsageError(f"model-name: {error}") from error
        _check_ranks(self.tp)
        if self.group_size not in (0, *GROUP_SIZES):
            raise UsageError(f"group-size is {self.group_size}, choose 128, 64 or 32")
        check_choice("head", self.head, HEADS)
        check_choice("for", self.engine, ENGINES)


@dataclass(frozen=True)
class KvQparamsOptions:
    """How KV statistics become the parameters of the static int8 cache (spec section 4.2).

    Attributes:
        kv_bits: bits of a stored code.
        is_symmetric: zero points 0.
        tp: ranks of the workspace; 0 takes what its config.ini says.
    """

    kv_bits: int = 8
    is_symmetric: bool = False
    tp: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: another number of bits, or a negative tp.
        """
        if self.kv_bits != 8:
            raise UsageError(f"kv-bits is {self.kv_bits}, the static KV cache stores 8 only")
        if self.tp < 0:
            raise UsageError(f"tp is {self.tp}, expected at least 1")


@dataclass(frozen=True)
class PackOptions:
    """For which boards a package is made.

    Attributes:
        target: board names with commas between them, or ``all``: every board that can hold it.
        kernels: ``auto`` compiles the CUDA kernels of the boards, ``none`` packs none, else a
            folder that ``turbojet-host kernels`` made.
    """

    target: str = ALL_TARGETS
    kernels: str = KERNELS_AUTO


@dataclass(frozen=True)
class BuildOptions:
    """All of the pipeline.

    Attributes:
        model_name: of the package; empty takes it from the source.
        fetch: how a model is downloaded.
        calibrate: the calibration set and its size.
        method: awq, rtn or none.
        w_bits: bits of a weight, where the method is not none.
        group_size: 0 takes the largest that fits the model.
        keep_fp16: patterns of linears that stay fp16.
        head: fp16 or int8.
        kv: static int8 KV parameters.
        tp: ranks the files are split for.
        template: name of a built-in chat template; empty takes the model's own.
        config: values of config.ini; None is planned for the target boards.
        target: board names, or ``all``.
        kernels: as for `PackOptions`.
    """

    model_name: str = ""
    fetch: FetchOptions = field(default_factory=FetchOptions)
    calibrate: CalibrateOptions = field(default_factory=CalibrateOptions)
    method: str = "awq"
    w_bits: int = 4
    group_size: int = 0
    keep_fp16: tuple[str, ...] = ()
    head: HeadType = "fp16"
    kv: KvQparamsOptions = field(default_factory=KvQparamsOptions)
    tp: int = 1
    template: str = ""
    config: ConfigValues = field(default_factory=ConfigValues)
    target: str = ALL_TARGETS
    kernels: str = KERNELS_AUTO

    def __post_init__(self) -> None:
        """Refuse what cannot be; the stages' own options check the rest.

        Raises:
            UsageError: an unknown method, group size or head, tp no power of two, or patterns
                where nothing is quantized.
        """
        _check_ranks(self.tp)
        check_choice("method", self.method, BUILD_METHODS)
        if self.group_size not in (0, *GROUP_SIZES):
            raise UsageError(f"w-group-size is {self.group_size}, choose 128, 64 or 32")
        check_choice("head", self.head, HEADS)
        if self.keep_fp16 and self.method == "none":
            raise UsageError("keep-fp16 goes with a method that quantizes, --method none does not")


def _check_ranks(tp: int) -> None:
    check_at_least_one("tp", tp)
    if tp & (tp - 1):
        raise UsageError(f"tp is {tp}, expected a power of two")
