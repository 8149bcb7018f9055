"""The pieces of the quantizer: grid, Gram objective, scales, clipping, one layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch

from device_runtime.errors import PackageError
from host_tools.awq import layer_solver, linear_solver
from host_tools.awq.channel_scales import (
    HeadSharing,
    centred,
    channel_importance,
    channel_scales,
)
from host_tools.awq.clip_search import group_errors, search_clipping
from host_tools.awq.curvature import Curvature
from host_tools.awq.gram import GramObserver, InputMoments, _Sums
from host_tools.awq.grid import MIN_SCALE, Grid
from host_tools.awq.layer_solver import (
    LayerSolver,
    QuantizedLayer,
    fold_into_norm,
    round_layer,
    solve_layer,
)
from host_tools.awq.tap_solver import TapJob, TapResult
from host_tools.checkpoint import Checkpoint, DenseLinear, LayerWeights
from host_tools.checkpoint.families import LINEARS
from host_tools.decoder.layer import DecoderLayer
from host_tools.decoder.rotary import Rotary
from host_tools.decoder.stream import Activations, LayerRunner

CPU = torch.device("cpu")
GROUP = 32


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outlier_inputs(num_tokens: int, channels: int, seed: int = 1) -> torch.Tensor:
    """Inputs that are correlated and whose channels differ in size, as in real models."""
    mixed = randn(num_tokens, channels, seed=seed) @ randn(channels, channels, seed=seed + 1)
    return mixed / channels**0.5 * torch.exp(1.5 * randn(channels, seed=seed + 2))


def moments_of(inputs: torch.Tensor) -> InputMoments:
    return InputMoments(inputs.T @ inputs / len(inputs), inputs.abs().mean(0), len(inputs))


def test_a_grid_by_hand() -> None:
    weight = torch.tensor([[-0.5, 0.25, 1.0, 0.0, 0.5, 3.0, 1.5, 6.0]])
    grid = Grid.spanning(weight, 4)
    # Group 0 spans -0.5..1: step 0.1 (fp16: 0.0999756), zero 5. Group 1 spans 0..6: step 0.4.
    assert grid.scales.tolist() == [[0.0999755859375, 0.39990234375]]
    assert grid.zeros.tolist() == [[5.0, 0.0]]
    codes = grid.codes(weight)
    # 0.25 / 0.1 = 2.5006 rounds to 3; 0.5 / 0.4 = 1.25 to 1; 3 / 0.4 = 7.5018 to 8; 1.5 to 4.
    assert codes.tolist() == [[0, 8, 15, 5, 1, 8, 4, 15]]
    values = grid.values(codes)
    assert values[0, 1] == torch.tensor(3 * 0.0999755859375).half().float()
    assert values[0, 7] == torch.tensor(15 * 0.39990234375).half().float()
    torch.testing.assert_close(grid.nearest(weight), values, rtol=2**-11, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_zeros_stay_in_four_bits_when_a_group_has_one_sign(sign: int) -> None:
    weight = sign * (randn(3, 64).abs() + 5)
    grid = Grid.spanning(weight, GROUP)
    assert (grid.zeros == (0 if sign > 0 else 15)).all()
    assert (grid.values(grid.codes(weight)) - weight).abs().max() <= grid.scales.max() / 2 + 0.01


def test_constant_and_tiny_groups_have_normal_scales() -> None:
    weight = torch.zeros(1, 64)
    weight[0, 32:] = 1e-5
    grid = Grid.spanning(weight, GROUP)
    assert (grid.scales == MIN_SCALE).all()
    assert grid.values(grid.codes(weight)).abs().max() == 0


def test_the_observer_adds_up_batches(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.write_llama(tmp_path))
    runner, seen = LayerRunner(checkpoint, 16, CPU), GramObserver()
    layer = runner.layer(0)
    states = randn(5, 16, 64)
    for part in (states[:3], states[3:]):
        runner.advance(layer, Activations(part.clone()), seen)
    inputs = layer.attention_input(states)
    rows = inputs.flatten(0, 1)
    moments = seen.take("qkv")
    torch.testing.assert_close(moments.gram, rows.T @ rows / 80, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.magnitude, rows.abs().mean(0), rtol=1e-4, atol=1e-6)
    down = layer.down_input(layer.ffn_input(states + layer.linear(
        "o", layer.o_input(inputs, runner.rotary))))  # fmt: skip
    rows = down.flatten(0, 1)
    torch.testing.assert_close(seen.take("down").gram, rows.T @ rows / 80, rtol=1e-3, atol=1e-5)
    assert seen.take("o").gram.shape == (64, 64)
    assert seen.take("gate_up").gram.shape == (64, 64)


def test_two_streams_give_the_drift_of_inputs_and_of_what_they_are_added_to() -> None:
    observer = GramObserver(num_streams=2)
    exact, quantized = randn(4, 5, 16), randn(4, 5, 16, seed=1)
    h_exact, h_quantized = randn(4, 5, 8, seed=2), randn(4, 5, 8, seed=3)
    for part in (slice(0, 3), slice(3, 4)):
        observer.residual("ffn", torch.cat([h_exact[part], h_quantized[part]]))
        pair = torch.cat([exact[part], quantized[part]])
        observer.linear("gate", pair, pair)
        observer.linear("up", pair, pair)
        observer.linear("down", pair, pair)
    x, y = exact.flatten(0, 1), quantized.flatten(0, 1)
    d = (h_exact - h_quantized).flatten(0, 1)
    for tap in ("gate_up", "down"):
        moments = observer.take(tap)
        assert moments.num_tokens == 20
        torch.testing.assert_close(moments.gram, y.T @ y / 20)
        torch.testing.assert_close(moments.magnitude, x.abs().mean(0))
        torch.testing.assert_close(moments.drift, (x - y).T @ y / 20)
        if tap == "down":
            torch.testing.assert_close(moments.residual_drift, d.T @ y / 20)
        else:
            assert moments.residual_drift is None


def test_one_stream_has_no_drift() -> None:
    observer = GramObserver()
    observer.residual("attention", randn(2, 5, 16))
    observer.linear("o", randn(2, 5, 16), randn(2, 5, 8))
    moments = observer.take("o")
    assert moments.drift is None
    assert moments.residual_drift is None


def test_clipping_never_costs_a_group_more_than_its_whole_range() -> None:
    weight = randn(24, 96) * torch.exp(randn(24, 96, seed=5))
    costs = torch.exp(randn(96, seed=6))
    whole = group_errors(Grid.spanning(weight, GROUP), weight, costs)
    clipped = group_errors(search_clipping(weight, costs, GROUP), weight, costs)
    assert (clipped <= whole).all()
    assert clipped.sum() < 0.95 * whole.sum()


def test_group_errors_by_hand() -> None:
    weight = torch.tensor([[0.0, 15.0, 7.4, 0.0, 3.0, -12.0]])
    # Group 0: step 1, 7.4 becomes 7. Group 1: step 1, zero 12, all exact.
    errors = group_errors(Grid.spanning(weight, 3), weight, torch.tensor([1.0, 1, 2, 1, 1, 1]))
    assert errors.tolist() == [[pytest.approx(2 * 0.4**2, rel=1e-5), 0.0]]


def test_strips_of_rows_are_searched_alike(monkeypatch) -> None:
    weight, costs = randn(24, 96), torch.exp(randn(96, seed=6))
    whole = search_clipping(weight, costs, GROUP)
    monkeypatch.setattr("host_tools.awq.grid.STRIP_WEIGHTS", {"cpu": 96 * 7})
    strips = search_clipping(weight, costs, GROUP)
    assert torch.equal(strips.scales, whole.scales)
    assert torch.equal(strips.zeros, whole.zeros)


def test_scales_by_hand() -> None:
    # Importance is 1 everywhere; magnitudes 1 and 32 give 1 and 32^0.2 = 2, centred to their root.
    scales = channel_scales(torch.ones(3, 2), torch.tensor([1.0, 32.0]), 2)
    torch.testing.assert_close(scales, torch.tensor([2**-0.5, 2**0.5]))
    assert centred(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.01, 100.0], rel=1e-4)


def test_channel_importance_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0], [3.0, 1.5]])
    # Row 0: 1/4 and 1. Row 1: 1 and 0.5.
    assert channel_importance(weight, 2).tolist() == [0.625, 0.75]


def test_query_heads_of_one_value_head_share_scales() -> None:
    sharing = HeadSharing(num_shared=2, head_dim=3)
    values = torch.arange(12.0)
    # Heads 0 and 1 share: (0 + 3) / 2; heads 2 and 3: (6 + 9) / 2.
    expected = [1.5, 2.5, 3.5, 1.5, 2.5, 3.5, 7.5, 8.5, 9.5, 7.5, 8.5, 9.5]
    assert sharing.average(values).tolist() == expected
    assert sharing.of_producer(sharing.average(values)).tolist() == [1.5, 2.5, 3.5, 7.5, 8.5, 9.5]


def test_a_folded_norm_and_its_scales_cancel_exactly() -> None:
    norm, scales = randn(64).abs() + 0.5, torch.exp(randn(64, seed=2))
    folded, exact = fold_into_norm(norm, scales)
    assert folded.dtype == torch.float16
    assert torch.allclose(folded.float() * exact, norm, rtol=1e-6)
    assert torch.allclose(exact, scales, rtol=2**-10)


def test_channels_without_a_norm_are_not_scaled() -> None:
    norm = torch.tensor([0.0, 1e-4, -2.0, 60000.0])
    folded, exact = fold_into_norm(norm, torch.tensor([3.0, 1000.0, 4.0, 0.01]))
    # 0 stays; 1e-7 and 6e6 leave fp16's normal range; -2 / 4 = -0.5 is fine.
    assert folded.tolist() == [0.0, torch.tensor(1e-4).half().item(), -0.5, 60000.0]
    assert exact[0] == 1.0
    assert exact[2] == 4.0
    torch.testing.assert_close(exact[[1, 3]], torch.ones(2), rtol=1e-3, atol=0)


@pytest.fixture
def layer(tmp_path: Path) -> DecoderLayer:
    config = {"architectures": ["InternLMForCausalLM"], "bias": True, **tiny.SIZES}
    tensors = tiny.llama_tensors(config)
    tiny.add_biases(tensors, ("q_proj", "k_proj", "v_proj", "o_proj"))
    checkpoint = Checkpoint.open(tiny.write_checkpoint(tmp_path / "layer", config, tensors))
    return DecoderLayer.ready(checkpoint.layer(0), checkpoint.model, CPU)


def run(layer: DecoderLayer, states: torch.Tensor, tmp_path: Path, seen=None) -> torch.Tensor:
    checkpoint = Checkpoint.open(tmp_path / "layer")
    activations = Activations(states.clone())
    runner = LayerRunner(checkpoint, states.shape[1], CPU)
    if seen is None:
        runner.advance(layer, activations)
    else:
        runner.advance(layer, activations, seen)
    return activations.states


def test_the_scales_of_all_pairs_cancel_in_floating_point(
    layer: DecoderLayer, tmp_path: Path, monkeypatch
) -> None:
    def scaled(job: TapJob, moments: InputMoments) -> TapResult:
        linears = {}
        for name, linear in job.linears.items():
            rows = job.row_scales.get(name, torch.ones(len(linear.weight)))
            weight = linear.weight * job.scales / rows[:, None]
            assert not torch.allclose(weight, linear.weight)
            bias = None if linear.bias is None else linear.bias / rows
            linears[name] = DenseLinear(weight, bias)
        return TapResult(linears, {})

    monkeypatch.setattr(layer_solver, "solve_tap", scaled)
    states, seen = randn(4, 32, 64) * torch.exp(randn(64, seed=3)), GramObserver()
    expected = run(layer, states, tmp_path, seen)
    weights = solve_layer(layer.weights, seen.take, layer.model, GROUP).weights
    output = run(DecoderLayer.ready(weights, layer.model, CPU), states, tmp_path)
    # Scales are divided out in fp32.
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def layer_error(
    layer: DecoderLayer, weights: LayerWeights, states: torch.Tensor, tmp_path: Path
) -> float:
    expected = run(layer, states, tmp_path)
    output = run(DecoderLayer.ready(weights, layer.model, CPU), states, tmp_path)
    return float((output - expected).pow(2).mean())


def test_every_step_lowers_the_error_of_every_linear(layer: DecoderLayer, tmp_path: Path) -> None:
    states, seen = randn(32, 32, 64) * torch.exp(1.5 * randn(64, seed=3)), GramObserver()
    run(layer, states, tmp_path, seen)
    solved = solve_layer(layer.weights, seen.take, layer.model, GROUP)
    assert tuple(record.linear for record in solved.records) == LINEARS
    for record in solved.records:
        assert record.clipped < record.scaled
        assert record.compensated < 0.97 * record.clipped
        assert record.compensated < 0.8 * record.rounded < record.signal
        assert sum(record.clip_counts) == record.num_outputs * record.num_inputs // GROUP
    rounded = round_layer(layer.weights, GROUP).weights
    error = layer_error(layer, solved.weights, states, tmp_path)
    assert error < 0.6 * layer_error(layer, rounded, states, tmp_path)


def test_stated_errors_are_output_errors(layer: DecoderLayer, tmp_path: Path) -> None:
    states, seen, again = randn(8, 32, 64), GramObserver(), GramObserver()
    run(layer, states, tmp_path, seen)
    run(layer, states, tmp_path, again)
    solved = solve_layer(layer.weights, seen.take, layer.model, GROUP)
    record, gram = solved.records[-1], again.take("down").gram
    weight = layer.weights.down.weight
    difference = Grid.spanning(weight, GROUP).nearest(weight) - weight
    assert record.rounded == pytest.approx(
        float(((difference @ gram) * difference).sum()), rel=1e-3
    )
    assert record.signal == pytest.approx(float(((weight @ gram) * weight).sum()), rel=1e-3)


def test_the_number_of_threads_does_not_change_a_code(layer: DecoderLayer, tmp_path: Path) -> None:
    states = randn(64, 32, 64)

    def solved() -> QuantizedLayer:
        seen = GramObserver()
        run(layer, states, tmp_path, seen)
        return solve_layer(layer.weights, seen.take, layer.model, GROUP)

    num_threads = torch.get_num_threads()
    layers = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            layers.append(solved().weights)
    finally:
        torch.set_num_threads(num_threads)
    for name in LINEARS:
        one, two = (weights.linear(name) for weights in layers)
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scales, two.scales)


def pair_moments(x: torch.Tensor, y: torch.Tensor, d: torch.Tensor | None) -> InputMoments:
    count = len(x)
    residual = None if d is None else d.T @ y / count
    return InputMoments(y.T @ y / count, x.abs().mean(0), count, (x - y).T @ y / count, residual)


@pytest.mark.parametrize("has_residual", [False, True])
def test_the_aim_is_what_least_squares_asks_for(monkeypatch, has_residual: bool) -> None:
    monkeypatch.setattr(linear_solver, "AIM", 1.0)
    monkeypatch.setattr("host_tools.awq.curvature.RIDGE_PER_INPUT", 0.0)
    monkeypatch.setattr("host_tools.awq.curvature.MIN_RIDGE", 1e-6)
    x, weight, scales = randn(400, 24), randn(12, 24, seed=1), torch.exp(randn(24, seed=2))
    y = x + 0.1 * randn(400, 24, seed=3)
    d = 0.1 * randn(400, 12, seed=4) + y[:, :12] if has_residual else None
    moments = pair_moments(x, y, d)
    due = x @ weight.T + (d if d is not None else 0)
    expected = torch.linalg.lstsq(y, due).solution.T
    aimed = linear_solver.aimed_weight(
        weight,
        linear_solver.drift_products(weight, moments),
        Curvature.of(moments.gram, moments.num_tokens, scales),
    )
    torch.testing.assert_close(aimed, expected, rtol=1e-3, atol=1e-3)


def test_the_quantized_stream_is_brought_back_to_the_exact_one(
    layer: DecoderLayer, tmp_path: Path
) -> None:
    exact = randn(64, 32, 64)
    quantized = exact + 0.2 * exact.roll(1, -1)
    expected = run(layer, exact, tmp_path)
    both, alone = GramObserver(num_streams=2), GramObserver()
    layer.forward(torch.cat([exact, quantized]), layer_rotary(layer), both)
    layer.forward(exact, layer_rotary(layer), alone)
    errors = []
    for seen in (both, alone):
        weights = solve_layer(layer.weights, seen.take, layer.model, GROUP).weights
        output = run(DecoderLayer.ready(weights, layer.model, CPU), quantized, tmp_path)
        errors.append(float((output - expected).pow(2).mean()))
    assert errors[0] < 0.8 * errors[1]


def layer_rotary(layer: DecoderLayer) -> Rotary:
    return Rotary.of(layer.model, 32, CPU)


def test_kept_linears_are_stored_as_they_are(layer: DecoderLayer, tmp_path: Path) -> None:
    states, seen = randn(16, 32, 64), GramObserver()
    run(layer, states, tmp_path, seen)
    kept = frozenset(("q", "k", "v", "down"))
    solved = solve_layer(layer.weights, seen.take, layer.model, GROUP, kept)
    for name in LINEARS:
        assert isinstance(solved.weights.linear(name), DenseLinear) == (name in kept)
    # down is not scaled, so up's outputs are not; v's are, for o.
    assert torch.equal(solved.weights.down.weight, layer.weights.down.weight.half())
    assert torch.equal(solved.weights.q.weight, layer.weights.q.weight.half())
    assert not torch.equal(solved.weights.v.weight, layer.weights.v.weight.half())
    assert torch.equal(solved.weights.attention_norm, layer.weights.attention_norm.half())
    assert [record.w_bits for record in solved.records] == [16, 16, 16, 4, 4, 4, 16]
    every = round_layer(layer.weights, GROUP, frozenset(LINEARS)).weights
    assert layer_error(layer, every, states, tmp_path) < 1e-6
    half = layer_error(layer, solved.weights, states, tmp_path)
    seen = GramObserver()
    run(layer, states, tmp_path, seen)
    whole = solve_layer(layer.weights, seen.take, layer.model, GROUP).weights
    assert half < layer_error(layer, whole, states, tmp_path)


def test_a_block_is_not_quantized_twice(layer: DecoderLayer, tmp_path: Path) -> None:
    seen = GramObserver()
    run(layer, randn(4, 32, 64), tmp_path, seen)
    solver = LayerSolver(layer.weights, layer.model, GROUP)
    moments = {tap: seen.take(tap) for tap in ("o", "qkv")}
    solver.solve("attention", moments.__getitem__)
    with pytest.raises(TypeError, match="o is quantized already"):
        solver.solve("attention", moments.__getitem__)


def test_nothing_seen_gives_no_moments() -> None:
    with pytest.raises(ValueError, match="nothing was seen"):
        _Sums().moments()


def test_rounding_gives_the_plain_codes(layer: DecoderLayer) -> None:
    stored = round_layer(layer.weights, GROUP).weights.gate
    weight = layer.weights.gate.weight
    grid = Grid.spanning(weight, GROUP)
    assert torch.equal(stored.codes.T.float(), grid.codes(weight))
    assert torch.equal(stored.weight.float(), grid.values(grid.codes(weight)))


def test_weights_beyond_fp16_are_refused(layer: DecoderLayer) -> None:
    huge = replace(layer.weights, o=DenseLinear(layer.weights.o.weight, torch.full((64,), 1e6)))
    with pytest.raises(PackageError, match=r"bias of o reaches 1e\+06, beyond the 65504 of fp16"):
        round_layer(huge, GROUP)
