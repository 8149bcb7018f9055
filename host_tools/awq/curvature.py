"""How a linear's output error depends on its weights' errors, made safe against too few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from device_runtime.errors import PackageError
from host_tools.awq.single_thread import single_thread

RIDGE_PER_INPUT = 3.0
"""The ridge, in mean diagonals of the Gram matrix, is this times inputs / tokens: what few tokens
say about the correlation of many inputs is mostly chance."""

MIN_RIDGE = 0.01
MIN_DIAGONAL = 1e-12


@dataclass(frozen=True)
class Curvature:
    """The quadratic form of a linear's output error.

    Its matrices are in ``order``: the inputs that matter most come first, so that those after them
    can make up for their errors. They belong to a weight whose inputs were multiplied by scales.

    Attributes:
        order: ``[in]`` int64, places of the inputs in the weight.
        back: ``[in]`` int64, the inverse permutation.
        scales: ``[in]`` fp32 of the inputs, in the weight's order.
        ridge: scalar tensor, what was added to the Gram matrix's diagonal before scaling.
        form: ``[in, in]`` fp32, the Gram matrix plus the ridge, scaled.
        factor: ``[in, in]`` fp32, upper triangular ``U`` with ``U^T U`` the inverse of the form
            (GPTQ, arXiv 2210.17323, section 3.3).
    """

    order: torch.Tensor
    back: torch.Tensor
    scales: torch.Tensor
    ridge: torch.Tensor
    form: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, num_tokens: int, scales: torch.Tensor) -> Curvature:
        """Return the curvature of a weight whose inputs are multiplied by ``scales``.

        Args:
            gram: ``[in, in]`` fp32, mean of ``x x^T`` over the tokens.
            num_tokens: that were seen.
            scales: ``[in]`` fp32.

        Raises:
            PackageError: the Gram matrix is not finite.
        """
        diagonal = gram.diagonal()
        share = MIN_RIDGE + RIDGE_PER_INPUT * len(gram) / num_tokens
        ridge = diagonal.mean().clamp(min=MIN_DIAGONAL) * share
        order = torch.argsort(diagonal, descending=True, stable=True)
        # Backwards, Cholesky's L with L L^T = form gives the factor as L^-1 read forwards again.
        backwards = order.flip(0)
        form = gram.index_select(0, backwards).index_select(1, backwards)
        del gram, diagonal  # of many inputs every such matrix counts
        form.diagonal().add_(ridge)
        form.div_(scales[backwards]).div_(scales[backwards].unsqueeze(1))
        # Threads would split its sums otherwise, and the last bits decide some of the codes.
        with single_thread(form.device), _full_precision():
            lower, failed = torch.linalg.cholesky_ex(form)
        if bool(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
            raise PackageError(
                f"activations that enter a linear of {len(form)} inputs are not finite in fp32, "
                f"the checkpoint cannot be calibrated"
            )
        inverse = torch.eye(len(form), dtype=form.dtype, device=form.device)
        with _full_precision():
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower
        factor = inverse.flip(0, 1)
        del inverse
        return cls(order, torch.argsort(order), scales, ridge, form.flip(0, 1), factor)

    def on(self, device: torch.device) -> Curvature:
        """Return the same curvature with its tensors on a device."""
        return Curvature(*(getattr(self, field.name).to(device) for field in fields(self)))

    @property
    def conditional(self) -> torch.Tensor:
        """What an error of each input costs once those after it made up for it, ``[in]``.

        In the weight's order.
        """
        costs: torch.Tensor = self.factor.diagonal()[self.back] ** -2.0
        return costs

    def solve(self, products: torch.Tensor) -> torch.Tensor:
        """Return ``products`` ``[out, in]`` times the inverse of Gram matrix plus ridge.

        Neither ``products`` nor the result are scaled.
        """
        # Scaled on both sides the form is S^-1 (G + ridge) S^-1.
        ordered = (products / self.scales)[:, self.order] @ self.factor.T
        return (ordered @ self.factor)[:, self.back].div_(self.scales)

    def output_errors(self, error: torch.Tensor) -> torch.Tensor:
        """Return the mean squared output error of each row of a scaled weight's error.

        Without the ridge: the mean over tokens of ``|e x|^2``.

        Args:
            error: ``[out, in]`` fp32.

        Returns:
            ``[out]`` fp32.
        """
        ordered = error[:, self.order]
        costs = torch.sum((ordered @ self.form) * ordered, dim=1)
        return costs - self.ridge * torch.sum((error / self.scales).square_(), dim=1)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep a GPU from rounding factors to TF32 inside a factorization, which would amplify it.

    Torch's triangular solve takes the setting of products. It is the process's: nothing else may
    multiply meanwhile.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
