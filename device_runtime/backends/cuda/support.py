"""Which packages the kernels can run, and why not the others."""

from __future__ import annotations

from device_runtime.backends.cuda.weights import has_half_matrices
from device_runtime.errors import DeviceError
from device_runtime.kernels.cubins import GROUP_SIZES
from device_runtime.kernels.gemm_shape import F16_TILES, W4A16_TILES
from device_runtime.kernels.table import GEMV_STAGES
from device_runtime.package_format.model_config import ModelConfig

HEAD_DIMS = (64, 128)
MAX_HEAD_RATIO = 16
"""Query heads that may share a kv head (decode_attention.cu)."""
_REMEDY = "use the reference backend"


def check_model(model: ModelConfig) -> None:
    """Refuse a model that the kernels were not written for.

    Raises:
        DeviceError: a size or type is not supported.
    """
    ratio = model.num_attention_heads // model.num_kv_heads
    faults = (
        (
            model.weight_type == "int4" and model.group_size not in GROUP_SIZES,
            f"group_size is {model.group_size}, the kernels take 128, 64 and 32; {_REMEDY}",
        ),
        (
            model.head_dim not in HEAD_DIMS,
            f"head_dim is {model.head_dim}, the kernels take 64 and 128; {_REMEDY}",
        ),
        (
            ratio > MAX_HEAD_RATIO,
            f"{ratio} query heads share a kv head, the kernels take up to {MAX_HEAD_RATIO}; "
            f"{_REMEDY}",
        ),
        (
            model.hidden_size % 64 != 0,
            f"hidden_size is {model.hidden_size}, the kernels take multiples of 64; {_REMEDY}",
        ),
        (
            model.intermediate_size % 32 != 0,
            f"intermediate_size is {model.intermediate_size}, the kernels take multiples of 32; "
            f"{_REMEDY}",
        ),
    )
    for is_fault, message in faults:
        if is_fault:
            raise DeviceError(message)


def sources_for(model: ModelConfig) -> tuple[str, ...]:
    """Return the .cu files, without suffix, that a model's steps launch on some device."""
    tiles = [f"f16_gemm_{tokens}" for tokens in F16_TILES] if has_half_matrices(model) else []
    if model.group_size:
        tiles += [f"w4a16_gemm_{tokens}" for tokens in W4A16_TILES]
        tiles += [f"w4a16_gemv_{width}" for width in GEMV_STAGES]
        tiles.append("w4a16_gemv_paired_1")
    return (
        "embedding",
        "rms_norm",
        "head_int8" if model.head_type == "int8" else "head_f16",
        "decode_attention",
        "prefill_attention",
        "store_kv",
        "mark_seen",
        "sample_top",
        "sample_draw",
        *tiles,
    )
