"""Where the fused kernels of the code search are used."""

from __future__ import annotations

import pytest
import torch

from host_tools.awq import fused_blocks
from host_tools.awq.fused_blocks import compensate_fused, is_fused

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_kernels_are_for_gpus_with_triton(monkeypatch) -> None:
    monkeypatch.setattr(fused_blocks, "_kernels", lambda: fused_blocks)
    assert is_fused(CUDA)
    assert not is_fused(CPU)
    monkeypatch.setattr(fused_blocks, "_kernels", lambda: None)
    assert not is_fused(CUDA)


def test_outputs_in_pieces_are_refused() -> None:
    block = torch.zeros(8, 16)
    with pytest.raises(ValueError, match="compensate_kernel fills arrays in one piece"):
        compensate_fused(block, block, block, torch.zeros(16, 8).T)
