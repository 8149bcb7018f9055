"""When the GPU's kernels of the code search are taken; tests/gpu compares what they compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from host_tools.awq import fused_blocks

CPU = torch.device("cpu")


class Kernel:
    """Launched like a Triton kernel; does what it is told."""

    def __init__(self, action):
        self.action = action
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.action


def kernels(monkeypatch: pytest.MonkeyPatch, action) -> Kernel:
    kernel = Kernel(action)
    module = SimpleNamespace(compensate_kernel=kernel)
    monkeypatch.setattr(fused_blocks, "_kernels", lambda: module)
    fused_blocks._can_launch.cache_clear()
    return kernel


@pytest.fixture(autouse=True)
def forget():
    yield
    fused_blocks._can_launch.cache_clear()


def test_kernels_that_round_as_they_should_are_taken(monkeypatch) -> None:
    kernel = kernels(monkeypatch, lambda codes, *rest, **sizes: codes.fill_(2.0))
    assert fused_blocks._can_launch(CPU)
    assert fused_blocks._can_launch(CPU)
    assert kernel.grids == [(1,)]  # tried once


def test_a_machine_that_cannot_compile_them_goes_without(monkeypatch) -> None:
    def fail(*arguments, **sizes):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    kernels(monkeypatch, fail)
    with pytest.warns(UserWarning, match=r"without Triton, slower: Failed to find C compiler\.$"):
        assert not fused_blocks._can_launch(CPU)


@pytest.mark.parametrize("code", [2.25, 3.0])
def test_kernels_that_compute_something_else_are_left_alone(monkeypatch, code: float) -> None:
    def act(codes, errors, raised, steps, *rest, **sizes):
        assert torch.all(raised / steps == 2.25)
        codes.fill_(code)

    kernels(monkeypatch, act)
    assert not fused_blocks._can_launch(CPU)


def test_a_cpu_and_a_torch_without_triton_use_the_plain_loops(monkeypatch) -> None:
    assert not fused_blocks.is_fused(CPU)
    monkeypatch.setattr(fused_blocks, "_kernels", lambda: None)
    fused_blocks._can_launch.cache_clear()
    assert not fused_blocks.is_fused(torch.device("cuda", 0))


def test_outputs_in_pieces_are_refused(monkeypatch) -> None:
    kernels(monkeypatch, None)
    codes = torch.empty(16, 4)[:, ::2]
    one = torch.ones(16, 2)
    with pytest.raises(ValueError, match="compensate_kernel fills arrays in one piece"):
        fused_blocks.compensate_fused(one, one, torch.zeros(16, 16), codes)
