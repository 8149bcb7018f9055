"""The pieces of the quantizer: grid, Gram objective, scales, clipping, one layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch

from device_runtime.errors import PackageError
from host_tools.awq.clip_search import diagonal_blocks, group_errors, search_clipping
from host_tools.awq.gram import CONSUMERS, GramObserver, InputMoments
from host_tools.awq.grid import MIN_SCALE, Grid
from host_tools.awq.layer_solver import fold_into_norm, round_layer, solve_layer
from host_tools.awq.scale_search import HeadSharing, channel_importance, search_scales
from host_tools.checkpoint import Checkpoint, DenseLinear, LayerWeights
from host_tools.checkpoint.families import LINEARS
from host_tools.decoder.layer import DecoderLayer
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
    return InputMoments(inputs.T @ inputs / len(inputs), inputs.abs().mean(0))


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


def test_the_gram_objective_is_the_output_error() -> None:
    inputs, error = outlier_inputs(300, 64), randn(48, 64, seed=9)
    direct = (inputs @ error.T).pow(2).sum(1).mean()
    assert moments_of(inputs).output_error(error) == pytest.approx(float(direct), rel=1e-4)


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


def test_clipping_never_costs_a_group_more_than_its_whole_range() -> None:
    weight = randn(24, 96) * torch.exp(randn(24, 96, seed=5))
    gram = moments_of(outlier_inputs(400, 96)).gram
    blocks = diagonal_blocks(gram, GROUP)
    assert torch.equal(blocks[1], gram[32:64, 32:64])
    whole = group_errors(Grid.spanning(weight, GROUP), weight, blocks)
    clipped = group_errors(search_clipping(weight, gram, GROUP), weight, blocks)
    assert (clipped <= whole).all()
    assert clipped.sum() < 0.95 * whole.sum()


def test_few_tokens_give_the_same_error_as_their_gram_matrix() -> None:
    inputs, error = outlier_inputs(12, 64), randn(40, 64)
    observer = GramObserver()
    for part in inputs.split(5):
        observer.linear("o", part, part)
    moments = observer.take("o")
    assert moments.rows is not None
    assert torch.allclose(moments.rows.T @ moments.rows, moments.gram, rtol=1e-5, atol=1e-6)
    by_gram = float(torch.sum((error @ moments.gram) * error))
    assert moments.output_error(error) == pytest.approx(by_gram, rel=1e-4)
    observer.linear("o", outlier_inputs(17, 64), inputs)
    assert observer.take("o").rows is None


def test_strips_of_rows_are_searched_alike(monkeypatch) -> None:
    weight, gram = randn(24, 96), moments_of(outlier_inputs(400, 96)).gram
    whole = search_clipping(weight, gram, GROUP)
    monkeypatch.setattr("host_tools.awq.grid.STRIP_WEIGHTS", {"cpu": 96 * 7})
    strips = search_clipping(weight, gram, GROUP)
    assert torch.equal(strips.scales, whole.scales)
    assert torch.equal(strips.zeros, whole.zeros)


def test_scales_never_cost_more_than_none() -> None:
    weight = randn(40, 64)
    inputs = outlier_inputs(500, 64)
    choice = search_scales(weight, moments_of(inputs), GROUP)
    rounded = Grid.spanning(weight, GROUP).nearest(weight)
    plain = (inputs @ (rounded - weight).T).pow(2).sum(1).mean()
    assert choice.plain_error == pytest.approx(float(plain), rel=1e-3)
    assert choice.error < 0.8 * choice.plain_error
    assert choice.scales.max() * choice.scales.min() == pytest.approx(1.0, rel=1e-4)
    flat = search_scales(weight, moments_of(randn(500, 64, seed=4)), GROUP)
    assert flat.error <= flat.plain_error


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
    scaled: dict[str, DenseLinear] = {}

    def keep(grid, weight, group_size, bias, name):
        scaled[name] = DenseLinear(weight, bias)
        return grid_of_nothing

    grid_of_nothing = object()
    monkeypatch.setattr("host_tools.awq.layer_solver._stored", keep)
    states, seen = randn(4, 32, 64) * torch.exp(randn(64, seed=3)), GramObserver()
    expected = run(layer, states, tmp_path, seen)
    solved = solve_layer(layer.weights, seen.take, layer.model, GROUP).weights
    weights = replace(
        layer.weights,
        attention_norm=solved.attention_norm.float(),
        ffn_norm=solved.ffn_norm.float(),
        **scaled,
    )
    for name in LINEARS:
        assert not torch.allclose(weights.linear(name).weight, layer.weights.linear(name).weight)
    output = run(DecoderLayer(weights, layer.model), states, tmp_path)
    # Scales are divided out in fp32.
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_awq_beats_rounding_on_what_the_layer_gives(layer: DecoderLayer, tmp_path: Path) -> None:
    states, seen = randn(8, 32, 64) * torch.exp(1.5 * randn(64, seed=3)), GramObserver()
    expected = run(layer, states, tmp_path, seen)
    solved = solve_layer(layer.weights, seen.take, layer.model, GROUP)
    for rounded, quantized in solved.errors.values():
        assert quantized <= rounded
    assert set(solved.errors) == set(CONSUMERS)

    def error(weights: LayerWeights) -> float:
        output = run(DecoderLayer.ready(weights, layer.model, CPU), states, tmp_path)
        return float((output - expected).pow(2).mean())

    assert error(solved.weights) < 0.8 * error(round_layer(layer.weights, GROUP).weights)


def test_stated_errors_are_output_errors(layer: DecoderLayer, tmp_path: Path) -> None:
    states, seen, moments = randn(8, 32, 64), GramObserver(), GramObserver()
    run(layer, states, tmp_path, seen)
    run(layer, states, tmp_path, moments)
    rounded, quantized = solve_layer(layer.weights, seen.take, layer.model, GROUP).errors["down"]
    weight = layer.weights.down.weight
    difference = Grid.spanning(weight, GROUP).nearest(weight) - weight
    assert rounded == pytest.approx(moments.take("down").output_error(difference), rel=1e-3)
    assert 0 < quantized < rounded


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
