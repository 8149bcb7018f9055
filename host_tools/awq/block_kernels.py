"""The loops of `compensation` over a block's inputs as Triton kernels: a program has some outputs.

Imported where triton is there alone, which comes with torch for CUDA. A program holds the block's
inputs of its outputs in registers; in each step it takes one row out by a masked sum. ``INPUTS`` is
``NUM_INPUTS`` rounded up to a power of two, ``OUTPUTS`` what one program has.
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
