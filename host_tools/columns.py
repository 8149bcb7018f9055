"""Sums and extrema over tokens, each the fastest way of the device: a GPU reads the rows once."""

from __future__ import annotations

import torch


def column_sums(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of each column of ``[rows, columns]`` fp32."""
    return rows.sum(0) if rows.is_cuda else _product_with_ones(rows)


def column_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of the magnitudes of each column of ``[rows, columns]`` fp32."""
    if rows.is_cuda:
        norms: torch.Tensor = torch.linalg.vector_norm(rows, ord=1, dim=0)
        return norms
    return _product_with_ones(rows.abs())


def column_extrema(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest of each column of ``[rows, columns]``."""
    if rows.is_cuda:
        return torch.aminmax(rows, dim=0)
    return rows.amin(0), rows.amax(0)


def _product_with_ones(rows: torch.Tensor) -> torch.Tensor:
    # An order of magnitude faster than sum(0) on a CPU.
    return (rows.new_ones(1, len(rows)) @ rows)[0]
