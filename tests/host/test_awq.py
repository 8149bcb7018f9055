"""The pieces of the quantizer: grid, Gram objective, scales, clipping, one layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch

from device_runtime.errors import PackageError
from host_tools import tap_passes
from host_tools.awq import gram, layer_solver, linear_solver, output_errors
from host_tools.awq.channel_scales import (
    HeadSharing,
    ValueRange,
    centred,
    channel_importance,
    channel_scales,
)
from host_tools.awq.clip_search import group_errors, search_clipping
from host_tools.awq.curvature import Curvature
from host_tools.awq.gram import CONSUMERS, InputMoments, MomentSums, Tap
from host_tools.awq.grid import MIN_SCALE, Grid
from host_tools.awq.layer_solver import (
    LayerSolver,
    QuantizedLayer,
    divided_outputs,
    fold_into_norm,
    round_layer,
    solve_layer,
)
from host_tools.awq.tap_solver import PreparedTap, TapResult, stored_linear
from host_tools.checkpoint import Checkpoint, DenseLinear, LayerWeights, QuantizedLinear
from host_tools.checkpoint.families import LINEARS
from host_tools.decoder.layer import DecoderLayer, Observer
from host_tools.decoder.rotary import Rotary
from host_tools.decoder.stream import Activations, LayerRunner
from host_tools.tap_passes import TapPasses

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


def test_batches_add_up_to_the_moments_of_both_streams() -> None:
    sums = MomentSums()
    exact, quantized, drift = randn(4, 5, 16), randn(4, 5, 16, seed=1), randn(4, 5, 8, seed=2)
    for part in (slice(0, 3), slice(3, 4)):
        sums.add(exact[part], quantized[part], drift[part])
    x, y, d = (stream.flatten(0, 1) for stream in (exact, quantized, drift))
    moments = sums.take()
    assert moments.num_tokens == 20
    torch.testing.assert_close(moments.gram, y.T @ y / 20)
    torch.testing.assert_close(moments.magnitude, x.abs().mean(0))
    torch.testing.assert_close(moments.drift, (x - y).T @ y / 20)
    torch.testing.assert_close(moments.residual_drift, d.T @ y / 20)
    with pytest.raises(ValueError, match="no activations were added"):
        sums.take()


@pytest.mark.parametrize("channels", [16, 21, 40])
def test_a_gpu_sums_half_of_a_gram_matrix(channels: int, monkeypatch) -> None:
    monkeypatch.setattr(gram, "STRIP_ROWS", 8)
    monkeypatch.setattr(gram, "_is_halved", lambda matrix: True)
    sums, inputs = MomentSums(), randn(4, 5, channels)
    # A batch of one stream and one of two: the Gram matrix is of the quantized one.
    sums.add(inputs[:2])
    sums.add(randn(2, 5, channels, seed=1), inputs[2:])
    moments = sums.take()
    torch.testing.assert_close(moments.gram, moments_of(inputs.flatten(0, 1)).gram)
    assert torch.equal(moments.gram, moments.gram.T)


def test_one_stream_has_no_drift() -> None:
    sums = MomentSums()
    sums.add(randn(2, 5, 16))
    moments = sums.take()
    assert moments.drift is None
    assert moments.residual_drift is None
    torch.testing.assert_close(moments.gram, moments_of(randn(2, 5, 16).flatten(0, 1)).gram)


def test_passes_see_what_the_linears_see(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.write_llama(tmp_path))
    runner = LayerRunner(checkpoint, 16, CPU)
    states, drifted = randn(5, 16, 64), randn(5, 16, 64) + 0.1 * randn(5, 16, 64, seed=1)
    layer = runner.layer(0)
    other = DecoderLayer.ready(round_layer(layer.weights, GROUP).weights, layer.model, CPU)
    passes = TapPasses(runner, runner, Activations(states.clone()), Activations(drifted.clone()))
    x, y = layer.attention_input(states), layer.attention_input(drifted)
    moments = passes.after_norm("attention", layer, layer)
    torch.testing.assert_close(moments.gram, y.flatten(0, 1).T @ y.flatten(0, 1) / 80)
    assert moments.residual_drift is None
    moments = passes.before_sum("attention", other, layer)
    x, y = (
        layer.o_input(x, runner.rotary),
        other.o_input(other.attention_input(drifted), runner.rotary),
    )
    torch.testing.assert_close(moments.magnitude, x.abs().mean((0, 1)))
    y, residual = y.flatten(0, 1), (states - drifted).flatten(0, 1)
    torch.testing.assert_close(moments.residual_drift, residual.T @ y / 80)
    torch.testing.assert_close(moments.drift, (x.flatten(0, 1) - y).T @ y / 80)
    passes.follow("attention", other)
    passes.after_norm("ffn", layer, layer)
    passes.before_sum("ffn", other, layer)
    passes.follow("ffn", other)
    # Bit for bit what a run gives that goes on after this layer.
    for stream, weights, started in (
        (passes.exact, layer, states),
        (passes.quantized, other, drifted),
    ):
        again = Activations(started.clone())
        runner.advance(weights, again)
        assert torch.equal(stream.states, again.states)


@pytest.mark.parametrize("block", ["attention", "ffn"])
def test_a_gpu_sums_the_drift_behind_the_last_linear(block, tmp_path: Path, monkeypatch) -> None:
    checkpoint = Checkpoint.open(tiny.write_llama(tmp_path))
    runner = LayerRunner(checkpoint, 16, CPU)
    states, drifted = randn(5, 16, 64), randn(5, 16, 64) + 0.1 * randn(5, 16, 64, seed=1)
    layer = runner.layer(0)
    other = DecoderLayer.ready(round_layer(layer.weights, GROUP).weights, layer.model, CPU)
    found, streams = [], []
    for is_behind in (False, True):
        monkeypatch.setattr(tap_passes, "_is_cheaper_behind_sum", lambda weight, it=is_behind: it)
        streams.append(Activations(states.clone()))
        passes = TapPasses(runner, runner, streams[-1], Activations(drifted.clone()))
        found.append(passes.before_sum(block, other, layer))
    before, behind = found
    assert before.drift is not None
    assert behind.drift is None
    weight = layer.weights.linear("o" if block == "attention" else "down").dense(torch.float32, CPU)
    products = linear_solver.drift_products(weight, before)
    # The inputs' own drift is no small part of it.
    assert (products - before.residual_drift).norm() > 0.05 * products.norm()
    torch.testing.assert_close(
        linear_solver.drift_products(weight, behind), products, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(behind.gram, before.gram)
    assert torch.equal(behind.magnitude, before.magnitude)
    assert torch.equal(streams[0].states, streams[1].states)


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


def run(layer: DecoderLayer, states: torch.Tensor) -> torch.Tensor:
    return layer.forward(states, Rotary.of(layer.model, states.shape[1], CPU))


class Inputs(Observer):
    """Keeps the inputs of every linear."""

    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor] = {}

    def linear(self, name, inputs, outputs) -> None:
        self.of[name] = inputs


def all_moments(
    layer: DecoderLayer, exact: torch.Tensor, quantized: torch.Tensor | None = None
) -> dict[Tap, InputMoments]:
    """Moments of every tap with nothing of the layer quantized."""
    seen, drifted, found = Inputs(), Inputs(), {}
    rotary = Rotary.of(layer.model, exact.shape[1], CPU)
    layer.forward(exact, rotary, seen)
    if quantized is not None:
        layer.forward(quantized, rotary, drifted)
    for tap, names in CONSUMERS.items():
        sums = MomentSums()
        sums.add(seen.of[names[0]], drifted.of.get(names[0]))
        found[tap] = sums.take()
    return found


def solved_layer(
    layer: DecoderLayer, states: torch.Tensor, kept: frozenset = frozenset()
) -> QuantizedLayer:
    moments = all_moments(layer, states)
    return solve_layer(layer.weights, moments.pop, layer.model, GROUP, kept)


def test_the_scales_of_all_pairs_cancel_in_floating_point(layer: DecoderLayer, monkeypatch) -> None:
    def scaled(tap: PreparedTap, run_jobs: object) -> TapResult:
        linears = {}
        for name, linear in tap.job.linears.items():
            weight = linear.weight * tap.job.scales
            assert not torch.allclose(weight, linear.weight)
            linears[name] = DenseLinear(weight, linear.bias)
        return TapResult(linears, {})

    monkeypatch.setattr(layer_solver, "solve_tap", scaled)
    monkeypatch.setattr(layer_solver, "in_fp16", lambda values, name: values.float())
    states = randn(4, 32, 64) * torch.exp(randn(64, seed=3))
    weights = solved_layer(layer, states).weights
    output = run(DecoderLayer.ready(weights, layer.model, CPU), states)
    # Scales are divided out in fp32.
    torch.testing.assert_close(output, run(layer, states), rtol=1e-4, atol=1e-4)


def test_a_range_of_values_by_hand() -> None:
    values = ValueRange(least=torch.tensor([-4.0, -1.0]), most=torch.tensor([2.0, 8.0]))
    assert values.factor(torch.tensor([8.0, 8.0])) == 1
    # 8 / 0.8 = 10 passes 8 by a quarter, which may be; 8 / 0.5 = 16 is twice as much.
    assert values.factor(torch.tensor([1.0, 0.8])) == 1
    assert values.factor(torch.tensor([1.0, 0.5])) == 2
    # -4 / 0.2 = -20 is five times -4.
    assert values.factor(torch.tensor([0.2, 1.0])) == 8


def test_scaled_values_stay_near_the_range_that_the_cache_was_told(layer: DecoderLayer) -> None:
    """A channel that o does not read makes its own scale extreme, and the others' with it."""
    layer.weights.o.weight[:, 3::16] = 0
    states = randn(8, 32, 64)
    seen = layer.attention_input(states) @ layer.weights.v.weight.T + layer.weights.v.bias
    seen = seen.flatten(0, 1)
    values = ValueRange(seen.amin(dim=0), seen.amax(dim=0))
    found = {}
    for name, told in (("free", None), ("bound", values)):
        solver = LayerSolver(layer.weights, layer.model, GROUP, values=told)
        moments = all_moments(layer, states)
        for tap in CONSUMERS:
            solver.solve(tap, lambda tap=tap, moments=moments: moments[tap])
        found[name] = solver.result().weights
    free, bound = found["free"], found["bound"]
    for name in LINEARS:
        for part in ("codes", "zeros"):
            one, two = (getattr(side.linear(name), part) for side in (free, bound))
            assert torch.equal(one, two), (name, part)
    factor = (bound.o.scales.float() / free.o.scales.float()).unique()
    assert len(factor) == 1 and factor.item() in (2, 4, 8, 16)
    assert torch.equal(bound.v.scales * factor, free.v.scales.float())
    spans = {}
    for name, weights in found.items():
        stored = DecoderLayer.ready(weights, layer.model, CPU)
        spans[name] = stored.attention_input(states) @ weights.v.dense(torch.float32, CPU).T
        spans[name] = spans[name] + weights.v.bias
    assert spans["free"].abs().max() > 2 * seen.abs().max()
    assert spans["bound"].abs().max() < 1.6 * seen.abs().max()


def test_a_quantized_producer_takes_the_scales_into_its_grids() -> None:
    linear = QuantizedLinear(
        codes=torch.full((4, 3), 9, dtype=torch.uint8),
        zeros=torch.full((1, 3), 1, dtype=torch.uint8),
        scales=torch.tensor([[0.5, 2.0**-13, 3.0]]).half(),
        group_size=4,
        bias=torch.tensor([1.0, 2.0, 3.0]).half(),
    )
    divided = divided_outputs(linear, torch.tensor([2.0, 4.0, 0.5]), "up")
    # 2^-13 / 4 is below the smallest normal fp16, which is kept instead.
    assert divided.scales.tolist() == [[0.25, MIN_SCALE, 6.0]]
    assert divided.bias.tolist() == [0.5, 0.5, 6.0]
    assert torch.equal(divided.codes, linear.codes)
    with pytest.raises(PackageError, match="bias of up reaches"):
        divided_outputs(linear, torch.tensor([1.0, 1.0, 1e-6]), "up")


def layer_error(layer: DecoderLayer, weights: LayerWeights, states: torch.Tensor) -> float:
    output = run(DecoderLayer.ready(weights, layer.model, CPU), states)
    return float((output - run(layer, states)).pow(2).mean())


def test_every_step_lowers_the_error_of_every_linear(layer: DecoderLayer) -> None:
    states = randn(32, 32, 64) * torch.exp(1.5 * randn(64, seed=3))
    solved = solved_layer(layer, states)
    assert tuple(record.linear for record in solved.records) == LINEARS
    for record in solved.records:
        assert record.clipped < record.scaled
        assert record.compensated < 0.97 * record.clipped
        assert record.compensated < 0.8 * record.rounded < record.signal
        assert sum(record.clip_counts) == record.num_outputs * record.num_inputs // GROUP
    rounded = round_layer(layer.weights, GROUP).weights
    assert layer_error(layer, solved.weights, states) < 0.6 * layer_error(layer, rounded, states)


def test_stated_errors_are_output_errors(layer: DecoderLayer) -> None:
    states = randn(8, 32, 64)
    record, gram = solved_layer(layer, states).records[-1], all_moments(layer, states)["down"].gram
    weight = layer.weights.down.weight
    error = Grid.spanning(weight, GROUP).nearest(weight) - weight
    assert record.rounded == pytest.approx(float(((error @ gram) * error).sum()), rel=1e-3)
    assert record.signal == pytest.approx(float(((weight @ gram) * weight).sum()), rel=1e-3)


def test_the_number_of_threads_does_not_change_a_code(layer: DecoderLayer) -> None:
    states = randn(64, 32, 64)
    num_threads = torch.get_num_threads()
    layers = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            layers.append(solved_layer(layer, states).weights)
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


def test_the_quantized_stream_is_brought_back_to_the_exact_one(layer: DecoderLayer) -> None:
    exact = randn(64, 32, 64)
    quantized = exact + 0.2 * exact.roll(1, -1)
    expected, errors = run(layer, exact), []
    for moments in (all_moments(layer, exact, quantized), all_moments(layer, exact)):
        weights = solve_layer(layer.weights, moments.pop, layer.model, GROUP).weights
        output = run(DecoderLayer.ready(weights, layer.model, CPU), quantized)
        errors.append(float((output - expected).pow(2).mean()))
    assert errors[0] < 0.97 * errors[1]


def test_kept_linears_are_stored_as_they_are(layer: DecoderLayer) -> None:
    states = randn(16, 32, 64)
    kept = frozenset(("q", "k", "v", "down"))
    solved = solved_layer(layer, states, kept)
    for name in LINEARS:
        assert isinstance(solved.weights.linear(name), DenseLinear) == (name in kept)
    # down is not scaled, so up's outputs are not; v's are, for o.
    assert torch.equal(solved.weights.down.weight, layer.weights.down.weight.half())
    assert torch.equal(solved.weights.q.weight, layer.weights.q.weight.half())
    assert not torch.equal(solved.weights.v.weight, layer.weights.v.weight.half())
    assert torch.equal(solved.weights.attention_norm, layer.weights.attention_norm.half())
    assert [record.w_bits for record in solved.records] == [16, 16, 16, 4, 4, 4, 16]
    every = round_layer(layer.weights, GROUP, frozenset(LINEARS)).weights
    assert layer_error(layer, every, states) < 1e-6
    whole = solved_layer(layer, states).weights
    assert layer_error(layer, solved.weights, states) < layer_error(layer, whole, states)


def test_a_tap_is_not_quantized_twice(layer: DecoderLayer) -> None:
    solver = LayerSolver(layer.weights, layer.model, GROUP)
    moments = all_moments(layer, randn(4, 32, 64))["qkv"]
    solver.solve("qkv", lambda: moments)
    with pytest.raises(TypeError, match="q is quantized already"):
        solver.solve("qkv", lambda: moments)


def test_strips_are_solved_alike_wherever_that_is(layer: DecoderLayer, monkeypatch) -> None:
    """Four devices have something to do in every tap, also where it has one linear."""
    states, asked = randn(8, 32, 64), []
    monkeypatch.setitem(linear_solver.MAX_ROWS, "cpu", 16)

    def backwards(jobs):
        asked.append([(strip.name, strip.end - strip.start) for strip in jobs])
        places = [torch.device("cpu", index % 4) for index in range(len(jobs))]
        found = {
            strip: jobs[strip](place) for strip, place in zip(reversed(jobs), places, strict=True)
        }
        return {strip: found[strip] for strip in jobs}

    solver = LayerSolver(layer.weights, layer.model, GROUP, run_jobs=backwards)
    moments = all_moments(layer, states)
    for tap in CONSUMERS:
        solver.solve(tap, lambda tap=tap: moments[tap])
    # 64 outputs of q, 32 of k and of v, in strips of 16; 96 of gate and of up.
    assert asked == [
        [("q", 16)] * 4 + [("k", 16)] * 2 + [("v", 16)] * 2,
        [("o", 16)] * 4,
        [("gate", 16)] * 6 + [("up", 16)] * 6,
        [("down", 16)] * 4,
    ]
    plain = solved_layer(layer, states)
    for name in LINEARS:
        one, two = (found.weights.linear(name) for found in (plain, solver.result()))
        for part in ("codes", "zeros", "scales"):
            assert torch.equal(getattr(one, part), getattr(two, part)), (name, part)
    assert plain.records == solver.result().records


def test_the_records_of_strips_are_those_of_the_whole(layer: DecoderLayer, monkeypatch) -> None:
    states = randn(8, 32, 64)
    monkeypatch.setattr(output_errors, "ERROR_ROWS", 24)  # every third output of q, and of o
    whole = solved_layer(layer, states).records
    monkeypatch.setitem(linear_solver.MAX_ROWS, "cpu", 20)  # 21, 21 and 22 outputs of 64
    parts = solved_layer(layer, states).records
    for one, two in zip(whole, parts, strict=True):
        assert one.clip_counts == two.clip_counts
        assert sum(one.clip_counts) == one.num_outputs * one.num_inputs // GROUP
        for step in ("signal", "rounded", "scaled", "clipped", "compensated"):
            # Sums in another order, at most.
            assert getattr(two, step) == pytest.approx(getattr(one, step), rel=1e-5)


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


def with_a_weight(layer: DecoderLayer, value: float) -> DecoderLayer:
    """Return the layer with one weight of down changed, and 1 in place of all that share its group.

    Then the group's step is a 15th of the weight, and only the greatest code stands for it.
    """
    weight = layer.weights.down.weight.clone()
    weight[3, :GROUP] = 1.0
    weight[3, 7] = value
    return replace(layer, weights=replace(layer.weights, down=DenseLinear(weight, None)))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        # 1e5 / 15 is in fp16 6668, 15 of them are 100020.
        (1e5, r"weight of down reaches 1e\+05, beyond the 65504 of fp16"),
        (2e6, "scales of down reaches inf, beyond the 65504 of fp16"),
        (1e30, "scales of down reaches inf, beyond the 65504 of fp16"),
    ],
)
def test_a_weight_whose_codes_leave_fp16_is_refused_by_either_method(
    layer: DecoderLayer, value: float, complaint: str
) -> None:
    changed = with_a_weight(layer, value)
    with pytest.raises(PackageError, match=complaint):
        round_layer(changed.weights, GROUP)
    with pytest.raises(PackageError, match=complaint.split(" reaches")[0]):
        solved_layer(changed, randn(8, 32, 64))


def test_codes_that_no_weight_has_may_leave_fp16() -> None:
    # 4400 * 15 is 66000, which is no fp16; 4400 * 14 is 61600.
    grid = Grid(torch.tensor([[4400.0]]), torch.tensor([[0.0]]))
    codes = torch.tensor([[0.0, 14.0]])
    assert stored_linear(grid, codes, 2, None, "down").weight.tolist() == [[0.0, 61600.0]]
    with pytest.raises(PackageError, match=r"weight of down reaches 6.6e\+04, beyond the 65504"):
        stored_linear(grid, codes + 1, 2, None, "down")
