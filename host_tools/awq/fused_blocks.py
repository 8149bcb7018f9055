"""One kernel where `compensation` and `clip_search` would send thousands of small ones.

Where triton is missing or cannot compile (it wants a C compiler), torch's own operations do the
same, slower. The results agree but for the last bits; on one kind of GPU they are always the same.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch

OUTPUTS = 32
"""Outputs of one program."""

CLIPPED_WEIGHTS = 4096
"""Weights of one program that looks for ranges: 32 for each of its threads."""


def is_fused(device: torch.device) -> bool:
    """Tell whether the kernels run on a device."""
    return device.type == "cuda" and _can_launch(device)


def compensate_fused(
    raised: torch.Tensor, steps: torch.Tensor, factor: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Do what `compensation.compensate_block` does; ``raised`` stays as it was."""
    errors = torch.empty_like(raised)
    _launch("compensate_kernel", (codes, errors), (raised, steps, factor))
    return errors


def descend_fused(
    codes: torch.Tensor,
    slopes: torch.Tensor,
    steps: torch.Tensor,
    paces: torch.Tensor,
    form: torch.Tensor,
    found: torch.Tensor,
) -> None:
    """Do what `compensation.descend_block` does; ``slopes`` stay as they were."""
    _launch("descend_kernel", (found,), (codes, slopes, steps, paces, form))


def clip_fused(
    weight: torch.Tensor, costs: torch.Tensor, group_size: int, **constants: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `clip_search.search_clipping` does.

    Args:
        weight: ``[out, in]`` fp32.
        costs: ``[in]`` fp32.
        group_size: of the codes, a power of two.
        constants: of the search, as clip_kernel names them.

    Returns:
        Scales and zeros of the groups, both ``[out, groups]`` fp32.
    """
    shape = (len(weight), weight.shape[1] // group_size)
    scales, zeros = weight.new_empty(shape), weight.new_empty(shape)
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        _kernels().clip_kernel[(-(-scales.numel() * group_size // CLIPPED_WEIGHTS),)](  # type: ignore[union-attr]
            scales,
            zeros,
            weight.contiguous(),
            costs.contiguous(),
            scales.numel(),
            shape[1],
            GROUP_SIZE=group_size,
            GROUPS=CLIPPED_WEIGHTS // group_size,
            **constants,
        )
    return scales, zeros


def _launch(name: str, outputs: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> None:
    """Start one program for every `OUTPUTS` columns; the first output tells the sizes.

    Raises:
        ValueError: an output is not in one piece, so the kernel could not fill it.
    """
    num_inputs, num_outputs = outputs[0].shape
    if not all(output.is_contiguous() for output in outputs):
        raise ValueError(f"{name} fills arrays in one piece")
    # The launch goes to the current device, which need not be that of the tensors.
    with torch.cuda.device_of(outputs[0]):  # type: ignore[no-untyped-call]
        getattr(_kernels(), name)[(-(-num_outputs // OUTPUTS),)](
            *outputs,
            *(values.contiguous() for values in inputs),
            num_outputs,
            NUM_INPUTS=num_inputs,
            INPUTS=max(16, 1 << (num_inputs - 1).bit_length()),
            OUTPUTS=OUTPUTS,
        )


@functools.cache
def _can_launch(device: torch.device) -> bool:
    """Try a smallest block once; a device where that fails goes without the kernels."""
    try:
        if _kernels() is None:
            return False
        raised = torch.full((16, 1), 4.5, device=device)
        steps, codes = torch.full_like(raised, 2.0), torch.empty_like(raised)
        compensate_fused(raised, steps, torch.zeros(16, 16, device=device), codes)
        return bool((codes == 2.0).all())  # 2.25, rounded
    except Exception as error:  # Triton raises what its compiler, its C compiler or the driver say
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"the code search runs without Triton, slower: {reason}", stacklevel=2)
        return False


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from host_tools.awq import block_kernels
    except ImportError:
        return None
    return block_kernels
