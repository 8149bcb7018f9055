"""Loops of `compensation` and `clip_search` as Triton kernels.

Imported where triton is there alone, which comes with torch for CUDA. A program of the first two
holds the inputs of a block for its outputs in registers; in each step it takes one row out by a
masked sum. ``INPUTS`` is ``NUM_INPUTS`` rounded up to a power of two, ``OUTPUTS`` what one program
has. A program of the third holds some groups of weights and tries all ranges on them.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

HALVES_GO_TO_EVEN: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: a small number plus this is rounded to a whole one, halves to even as torch does."""

MAX_CODE: tl.constexpr = tl.constexpr(15.0)


@triton.jit
def compensate_kernel(
    codes_out,  # [NUM_INPUTS, num_outputs] fp32
    errors_out,  # [NUM_INPUTS, num_outputs] fp32
    raised_in,  # [NUM_INPUTS, num_outputs] fp32
    steps_in,  # [NUM_INPUTS, num_outputs] fp32
    factor_in,  # [NUM_INPUTS, NUM_INPUTS] fp32, upper triangular
    num_outputs,
    NUM_INPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Round one input after another; the later ones of the block make up for its error."""
    rows = tl.arange(0, INPUTS)
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_column = columns < num_outputs
    places = rows[:, None] * num_outputs + columns[None, :]
    is_there = (rows[:, None] < NUM_INPUTS) & is_column[None, :]
    raised = tl.load(raised_in + places, mask=is_there, other=0.0)
    for index in range(NUM_INPUTS):
        row = tl.sum(tl.where(rows[:, None] == index, raised, 0.0), axis=0)
        step = tl.load(steps_in + index * num_outputs + columns, mask=is_column, other=1.0)
        code = tl.minimum(tl.maximum(row / step, 0.0), MAX_CODE)
        code = (code + HALVES_GO_TO_EVEN) - HALVES_GO_TO_EVEN
        error = row - code * step
        tl.store(codes_out + index * num_outputs + columns, code, mask=is_column)
        tl.store(errors_out + index * num_outputs + columns, error, mask=is_column)
        is_later = (rows > index) & (rows < NUM_INPUTS)
        factor = tl.load(factor_in + index * NUM_INPUTS + rows, mask=is_later, other=0.0)
        raised -= factor[:, None] * error[None, :]


@triton.jit
def descend_kernel(
    found_out,  # [NUM_INPUTS, num_outputs] fp32
    codes_in,  # [NUM_INPUTS, num_outputs] fp32
    slopes_in,  # [NUM_INPUTS, num_outputs] fp32
    steps_in,  # [NUM_INPUTS, num_outputs] fp32
    paces_in,  # [NUM_INPUTS, num_outputs] fp32
    form_in,  # [NUM_INPUTS, NUM_INPUTS] fp32, symmetric
    num_outputs,
    NUM_INPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Move one input's code after another to the best one given all others."""
    rows = tl.arange(0, INPUTS)
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_column = columns < num_outputs
    places = rows[:, None] * num_outputs + columns[None, :]
    is_there = (rows[:, None] < NUM_INPUTS) & is_column[None, :]
    slopes = tl.load(slopes_in + places, mask=is_there, other=0.0)
    for index in range(NUM_INPUTS):
        slope = tl.sum(tl.where(rows[:, None] == index, slopes, 0.0), axis=0)
        place = index * num_outputs + columns
        code = tl.load(codes_in + place, mask=is_column, other=0.0)
        step = tl.load(steps_in + place, mask=is_column, other=0.0)
        pace = tl.load(paces_in + place, mask=is_column, other=0.0)
        best = tl.minimum(tl.maximum(code - slope * pace, 0.0), MAX_CODE)
        best = (best + HALVES_GO_TO_EVEN) - HALVES_GO_TO_EVEN
        tl.store(found_out + place, best, mask=is_column)
        moved = (best - code) * step
        is_later = (rows > index) & (rows < NUM_INPUTS)
        form = tl.load(form_in + index * NUM_INPUTS + rows, mask=is_later, other=0.0)
        slopes += form[:, None] * moved[None, :]


@triton.jit
def clip_kernel(
    scales_out,  # [num_groups] fp32 holding fp16 values
    zeros_out,  # [num_groups] fp32 whole numbers
    weight_in,  # [num_groups, GROUP_SIZE] fp32
    costs_in,  # [output_groups, GROUP_SIZE] fp32
    num_groups,  # of all outputs
    output_groups,  # of one output
    MIN_SCALE: tl.constexpr,
    NUM_SHRINKS: tl.constexpr,
    SHRINK: tl.constexpr,
    NUM_TRIMS: tl.constexpr,
    TRIM: tl.constexpr,
    MAX_END: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Find the range of each group whose rounding costs least."""
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    columns = tl.arange(0, GROUP_SIZE)[None, :]
    is_there = groups < num_groups
    places = groups[:, None] * GROUP_SIZE + columns
    weight = tl.load(weight_in + places, mask=is_there[:, None], other=0.0)
    costs = tl.load(costs_in + (groups % output_groups)[:, None] * GROUP_SIZE + columns)
    low = tl.minimum(tl.min(weight, axis=1), 0.0)
    high = tl.maximum(tl.max(weight, axis=1), 0.0)
    whole = tl.full((GROUPS,), 1.0, tl.float32)
    scale, zero, least = _tried(weight, costs, low, high, MIN_SCALE)
    best = (least, scale, zero, whole, whole)
    for step in range(1, NUM_SHRINKS):
        kept = whole - step * SHRINK
        best = _better(weight, costs, low, high, kept, kept, best, MIN_SCALE)
    # Each end in turn, inwards first.
    for trial in range(4 * NUM_TRIMS):
        change = (trial // 4 + 1) * TRIM
        change = tl.where(trial % 4 < 2, -change, change)
        is_low = trial % 2 == 0
        kept_low = tl.where(is_low, tl.minimum(best[3] + change, MAX_END), best[3])
        kept_high = tl.where(is_low, best[4], tl.minimum(best[4] + change, MAX_END))
        best = _better(weight, costs, low, high, kept_low, kept_high, best, MIN_SCALE)
    tl.store(scales_out + groups, best[1], mask=is_there)
    tl.store(zeros_out + groups, best[2], mask=is_there)


@triton.jit
def _better(weight, costs, low, high, kept_low, kept_high, best, MIN_SCALE: tl.constexpr):
    """Return the cheaper of the best so far and the grid of what is kept of both ends.

    Cost, scale, zero, and the shares of the ends that are kept.
    """
    scale, zero, cost = _tried(weight, costs, low * kept_low, high * kept_high, MIN_SCALE)
    is_better = cost < best[0]
    return (
        tl.where(is_better, cost, best[0]),
        tl.where(is_better, scale, best[1]),
        tl.where(is_better, zero, best[2]),
        tl.where(is_better, kept_low, best[3]),
        tl.where(is_better, kept_high, best[4]),
    )


@triton.jit
def _tried(weight, costs, low, high, MIN_SCALE: tl.constexpr):
    """Return scale and zero of the grid that spans a range, and what rounding to it costs."""
    scale = tl.maximum((high - low) / MAX_CODE, MIN_SCALE).to(tl.float16).to(tl.float32)
    zero = (-low / scale + HALVES_GO_TO_EVEN) - HALVES_GO_TO_EVEN
    zero = tl.minimum(tl.maximum(zero, 0.0), MAX_CODE)
    steps = (weight / scale[:, None] + HALVES_GO_TO_EVEN) - HALVES_GO_TO_EVEN
    steps = tl.minimum(tl.maximum(steps, -zero[:, None]), MAX_CODE - zero[:, None])
    error = steps * scale[:, None] - weight
    return scale, zero, tl.sum(error * error * costs, axis=1)
