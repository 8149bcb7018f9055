"""The kernels that choose ranges and codes, against torch's own operations."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch", reason="quantize needs torch")
pytest.importorskip("triton", reason="triton comes with torch for CUDA")

from host_tools.awq import clip_search, compensation, fused_blocks  # noqa: E402

SHAPES = [(128, 70), (64, 33), (40, 5)]
if torch.cuda.is_available():
    SHAPES.append((128, 11008))


def place() -> torch.device:
    """The GPU; with TRITON_INTERPRET=1 the kernels run on a CPU as well."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_compensation_chooses_the_codes_of_the_plain_loop(num_inputs, num_outputs) -> None:
    generator = torch.Generator().manual_seed(num_inputs)
    raised = torch.rand(num_inputs, num_outputs, generator=generator).mul_(1.4).sub_(0.2)
    steps = torch.rand(num_inputs, num_outputs, generator=generator).mul_(0.05).add_(0.05)
    factor = torch.randn(num_inputs, num_inputs, generator=generator).mul_(0.1).triu_(1)
    factor += torch.eye(num_inputs)
    expected = torch.empty(num_inputs, num_outputs)
    expected_errors = compensation.compensate_block(raised.clone(), steps, factor, expected)
    found = torch.full((num_inputs, num_outputs), torch.nan, device=place())
    errors = fused_blocks.compensate_fused(
        raised.to(place()), steps.to(place()), factor.to(place()), found
    )
    # Sums of other roundings move a weight across the middle between two codes now and then, and
    # the inputs after it make up for that.
    agrees = (found.cpu() == expected).all(dim=0)
    assert agrees.float().mean() > 0.99
    assert torch.all((found >= 0) & (found <= 15) & (found == found.round()))
    difference = (errors.cpu() - expected_errors)[:, agrees]
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_descent_chooses_the_codes_of_the_plain_loop(num_inputs, num_outputs) -> None:
    generator = torch.Generator().manual_seed(num_outputs)
    codes = torch.randint(0, 16, (num_inputs, num_outputs), generator=generator).float()
    steps = torch.rand(num_inputs, num_outputs, generator=generator).mul_(0.05).add_(0.05)
    root = torch.randn(num_inputs, num_inputs, generator=generator)
    form = root @ root.T
    slopes = torch.randn(num_inputs, num_outputs, generator=generator)
    paces = (steps * form.diagonal().unsqueeze(1)).reciprocal()
    expected = torch.empty(num_inputs, num_outputs)
    compensation.descend_block(codes, slopes.clone(), steps, paces, form, expected)
    found = torch.full((num_inputs, num_outputs), torch.nan, device=place())
    moved = [values.to(place()) for values in (codes, slopes, steps, paces, form)]
    fused_blocks.descend_fused(*moved, found)
    assert (found.cpu() == expected).all(dim=0).float().mean() > 0.99


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_outputs", [3, 70])
def test_ranges_cost_what_those_of_the_plain_search_do(
    group_size, num_outputs, monkeypatch
) -> None:
    generator = torch.Generator().manual_seed(group_size)
    weight = torch.randn(num_outputs, 5 * group_size, generator=generator)
    weight[:, ::7] *= 4
    weight[0, :group_size] = 0
    weight[1].abs_()
    costs = torch.rand(5 * group_size, generator=generator)
    expected = clip_search.search_clipping(weight, costs, group_size)
    monkeypatch.setattr(clip_search, "is_fused", lambda device: True)
    found = clip_search.search_clipping(weight.to(place()), costs.to(place()), group_size)
    scales, zeros = found.scales.cpu(), found.zeros.cpu()
    # Ranges that cost the same but for the last bits are taken the one or the other.
    agrees = (scales == expected.scales) & (zeros == expected.zeros)
    assert agrees.float().mean() > 0.95
    grid = clip_search.Grid(scales, zeros)
    before, after = (clip_search.group_errors(g, weight, costs) for g in (expected, grid))
    assert torch.all((after - before).abs() <= 1e-2 * before)
    assert torch.equal(scales, scales.half().float())
    assert torch.all((zeros >= 0) & (zeros <= 15) & (zeros == zeros.round()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_threads_that_solve_systems_at_once_get_the_same() -> None:
    # Two GPUs where there are.
    devices = [torch.device("cuda", index) for index in (0, torch.cuda.device_count() - 1)]
    generator = torch.Generator().manual_seed(5)
    roots = torch.randn(3669, 32, 64, generator=generator)
    systems = roots @ roots.mT + 0.01 * torch.eye(32)
    wanted = torch.randn(3669, 32, generator=generator)
    expected = compensation.solve_systems(systems.to(devices[0]), wanted.to(devices[0])).cpu()

    def solve(device: torch.device) -> int:
        mine, right = systems.to(device), wanted.to(device)
        found = [compensation.solve_systems(mine, right).cpu() for _ in range(100)]
        return sum(torch.equal(each, expected) for each in found)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(solve, devices)) == [100, 100]
    assert torch.allclose((systems @ expected.unsqueeze(-1)).squeeze(-1), wanted, atol=1e-2)
