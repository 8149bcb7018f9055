"""Chooses codes so that the errors of one row cancel in the output instead of adding up.

Everything here is transposed, ``[in, out]`` with inputs in the curvature's order: a step works on
one input of all outputs, which then lies in one piece of memory.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from device_runtime.package_format.int4 import MAX_CODE
from host_tools.awq.curvature import Curvature
from host_tools.awq.fused_blocks import compensate_fused, descend_fused, is_fused
from host_tools.awq.grid import Grid

BLOCK = 128
"""Inputs that are worked on one by one; the rest hears of a block's errors in one product."""


@dataclass(frozen=True)
class InputGrids:
    """The grid of every input in the curvature's order.

    Attributes:
        steps: ``[groups, out]`` fp32, what one code is worth.
        zeros: ``[groups, out]`` fp32, the code of zero.
        groups: ``[in]`` int64, the group of each input.
    """

    steps: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor

    @classmethod
    def of(cls, grid: Grid, curvature: Curvature) -> InputGrids:
        """Return the grid turned over and put in order."""
        group_size = len(curvature.order) // grid.scales.shape[1]
        return cls(
            grid.scales.T.contiguous(),
            grid.zeros.T.contiguous(),
            torch.div(curvature.order, group_size, rounding_mode="floor"),
        )

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return what codes ``[in, out]`` stand for, not rounded to fp16."""
        return (codes - self.zeros[self.groups]).mul_(self.steps[self.groups])


def compensate(weight: torch.Tensor, grids: InputGrids, curvature: Curvature) -> torch.Tensor:
    """Round input by input and let the inputs that follow make up for each error (GPTQ).

    Args:
        weight: ``[in, out]`` fp32; is overwritten.
        grids: where its codes can lie.
        curvature: of the inputs.

    Returns:
        The codes ``[in, out]``, fp32 whole numbers from 0 to 15.
    """
    codes = weight.new_empty(weight.shape)
    factor = curvature.factor
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        groups = grids.groups[start:end]
        steps = grids.steps[groups]
        # Rows of the factor over its diagonal: errors then need no division.
        rows = factor[start:end] / factor.diagonal()[start:end].unsqueeze(1)
        # Measured from code 0 instead of from the zero, a weight is code * step.
        raised = torch.addcmul(weight[start:end], grids.zeros[groups], steps)
        errors = compensate_block(raised, steps, rows[:, start:end], codes[start:end])
        weight[end:].addmm_(rows[:, end:].T, errors, alpha=-1)
    return codes


def compensate_block(
    raised: torch.Tensor, steps: torch.Tensor, factor: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Round a block's inputs one by one and let the later ones of the block make up for it.

    Args:
        raised: ``[block, out]`` fp32, weights measured from code 0; is overwritten.
        steps: ``[block, out]`` fp32.
        factor: ``[block, block]`` fp32, upper triangular with ones on its diagonal.
        codes: ``[block, out]``, receives the codes.

    Returns:
        Errors ``[block, out]`` of each input as it came to its turn.
    """
    if is_fused(raised.device):
        return compensate_fused(raised, steps, factor, codes)
    errors = torch.empty_like(raised)
    inverse = steps.reciprocal()
    for index in range(len(raised)):
        row, code, error = raised[index], codes[index], errors[index]
        torch.mul(row, inverse[index], out=code).round_().clamp_(0, MAX_CODE)
        torch.addcmul(row, code, steps[index], value=-1, out=error)
        raised[index + 1 :].addr_(factor[index, index + 1 :], error, alpha=-1)
    return errors


def descend(
    codes: torch.Tensor, weight: torch.Tensor, grids: InputGrids, form: torch.Tensor
) -> torch.Tensor:
    """Move every code to the best one given all others, once through all inputs.

    The form's value never rises: coordinate descent on whole numbers.

    Args:
        codes: ``[in, out]`` fp32 whole numbers.
        weight: ``[in, out]``, what they should stand for.
        grids: where they lie.
        form: ``[in, in]`` of the curvature.

    Returns:
        New codes ``[in, out]``.
    """
    found = codes.new_empty(codes.shape)
    difference = grids.values(codes).sub_(weight)
    diagonal = form.diagonal()
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        steps = grids.steps[grids.groups[start:end]]
        # A step of a code changes the slope by this much times the step.
        paces = (steps * diagonal[start:end].unsqueeze(1)).reciprocal_()
        slopes = form[start:end] @ difference
        block = form[start:end, start:end]
        descend_block(codes[start:end], slopes, steps, paces, block, found[start:end])
        difference[start:end] += (found[start:end] - codes[start:end]).mul_(steps)
    return found


def descend_block(
    codes: torch.Tensor,
    slopes: torch.Tensor,
    steps: torch.Tensor,
    paces: torch.Tensor,
    form: torch.Tensor,
    found: torch.Tensor,
) -> None:
    """Move a block's codes one input after another.

    Args:
        codes: ``[block, out]`` as they are.
        slopes: ``[block, out]``, half the derivative of the error by each value; is overwritten.
        steps: ``[block, out]``.
        paces: ``[block, out]``, one over step and diagonal.
        form: ``[block, block]``.
        found: ``[block, out]``, receives the codes.
    """
    if is_fused(codes.device):
        descend_fused(codes, slopes, steps, paces, form, found)
        return
    for index in range(len(codes)):
        code, best = codes[index], found[index]
        torch.addcmul(code, slopes[index], paces[index], value=-1, out=best)
        best.round_().clamp_(0, MAX_CODE)
        moved = torch.sub(best, code).mul_(steps[index])
        slopes[index + 1 :].addr_(form[index + 1 :, index], moved)


def refit_steps(
    codes: torch.Tensor, weight: torch.Tensor, grids: InputGrids, curvature: Curvature
) -> torch.Tensor:
    """Return the steps that fit given codes best: for each output a small linear system.

    Args:
        codes: ``[in, out]`` fp32 whole numbers.
        weight: ``[in, out]``.
        grids: their zeros.
        curvature: of the inputs.

    Returns:
        ``[groups, out]`` fp32; a step may be anything, the caller bounds it.
    """
    num_groups, num_outputs = grids.steps.shape
    counts = codes - grids.zeros[grids.groups]

    def by_group(products: torch.Tensor) -> torch.Tensor:
        products = products.mul_(counts)[curvature.back]
        return products.view(num_groups, -1, num_outputs).sum(1)

    wanted = by_group(curvature.form @ weight)
    system = wanted.new_empty(num_outputs, num_groups, num_groups)
    for group, places in enumerate(curvature.back.view(num_groups, -1)):
        products = curvature.form.index_select(1, places) @ counts[places]
        system[:, :, group] = by_group(products).T
    # A group whose codes are all zero leaves a row of zeros.
    ridge = system.diagonal(dim1=1, dim2=2).mean(-1).clamp_(min=1e-20) * 1e-6
    system.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(-1))
    return solve_systems(system, wanted.T).T.contiguous()


_SOLVING = threading.Lock()


def solve_systems(systems: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Solve a linear system for each output, on a GPU no two calls at once.

    Torch 2.11 factorizes batches by MAGMA there, of which two threads that use it give wrong
    results or an illegal access, also on two devices. A call returns when its GPU is done.

    Args:
        systems: ``[out, n, n]``.
        wanted: ``[out, n]``.

    Returns:
        ``[out, n]``.
    """
    solved: torch.Tensor
    if not systems.is_cuda:
        solved = torch.linalg.solve(systems, wanted.unsqueeze(-1))
    else:
        with _SOLVING:
            solved = torch.linalg.solve(systems, wanted.unsqueeze(-1))
            torch.cuda.synchronize(systems.device)
    return solved.squeeze(-1)
