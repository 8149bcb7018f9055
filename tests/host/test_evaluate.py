"""Perplexity of checkpoints and packages, and how far apart they are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from transformers import LlamaForCausalLM

from device_runtime.errors import PackageError, UsageError
from host_tools import cli, evaluation_targets
from host_tools.convert import convert
from host_tools.evaluate import evaluate, perplexity
from host_tools.evaluation_targets import dataset_cache_dir
from host_tools.options import EvaluateOptions, QuantizeOptions
from host_tools.pack import pack
from host_tools.package_options import ConvertOptions, PackOptions
from host_tools.perplexity_figures import MAX_FIGURE, capped, perplexity_of, shown
from host_tools.progress import Progress
from host_tools.quantize import quantize

SEQLEN = 40


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    folder = tiny.write_llama(tmp_path / "checkpoint", eos_token_id=127)
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def options(tmp_path: Path, monkeypatch) -> EvaluateOptions:
    # 40 tokens are a chunk of 16, one of 16 and one of 8.
    monkeypatch.setattr(evaluation_targets, "CHUNK_TOKENS", 16)
    text = tiny.write_text(tmp_path / "words.txt")
    return EvaluateOptions(dataset=str(text), num_samples=3, seqlen=SEQLEN, device="cpu")


def rounded(checkpoint_dir: Path, output: Path) -> Path:
    method = QuantizeOptions(group_size=32, method="rtn", device="cpu")
    return quantize(checkpoint_dir, output.with_name("work"), output, method, Progress())


def published_loss(folder: Path, text: Path) -> tuple[float, torch.Tensor]:
    """Perplexity and log-probabilities by transformers, window by window."""
    words = [int(word[1:]) for word in text.read_text().split()]
    windows = torch.tensor(words[: 3 * SEQLEN]).view(3, SEQLEN)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        scores = model(windows).logits.log_softmax(-1)
    losses = -scores[:, :-1].gather(2, windows[:, 1:, None])
    return math.exp(losses.mean()), scores


def test_perplexity_is_that_of_transformers(checkpoint_dir: Path, options) -> None:
    expected, _ = published_loss(checkpoint_dir, Path(options.dataset))
    result = perplexity(checkpoint_dir, options, Progress())
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert result.num_predictions == 3 * (SEQLEN - 1)
    assert (result.target, result.kind) == (str(checkpoint_dir), "checkpoint")
    assert result.seconds_s > 0


def test_targets_are_compared_with_the_first(tmp_path: Path, checkpoint_dir: Path, options) -> None:
    awq = rounded(checkpoint_dir, tmp_path / "awq")
    report = evaluate([checkpoint_dir, awq, checkpoint_dir], options, Progress())
    assert [result.kind for result in report.results] == [
        "checkpoint",
        "AWQ checkpoint",
        "checkpoint",
    ]
    far, same = report.comparisons
    assert (same.perplexity_increase, same.top1_agreement) == (0.0, 1.0)
    assert same.kl_divergence == pytest.approx(0.0, abs=1e-7)
    ratio = report.results[1].perplexity / report.results[0].perplexity
    assert far.perplexity_increase == pytest.approx(ratio - 1)
    dense = tiny.read_tensors(checkpoint_dir)
    for name in tiny.read_tensors(awq):
        if name.endswith(".qweight"):
            module, layer = name.removesuffix(".qweight"), int(name.split(".")[2])
            linear = evaluation_targets.Checkpoint.open(awq).layer(layer)
            part = module.rsplit(".", 1)[1].removesuffix("_proj")
            dense[f"{module}.weight"] = linear.linear(part).weight
    config = json.loads((checkpoint_dir / "config.json").read_text())
    folder = tiny.write_checkpoint(tmp_path / "dense", config, dense)
    text = Path(options.dataset)
    (_, reference), (_, scores) = published_loss(checkpoint_dir, text), published_loss(folder, text)
    divergence = (reference.exp() * (reference - scores)).sum(-1).mean()
    assert far.kl_divergence == pytest.approx(float(divergence), rel=1e-3)
    agreed = (reference.argmax(-1) == scores.argmax(-1)).float().mean()
    assert far.top1_agreement == pytest.approx(float(agreed))


@pytest.fixture
def workspace(tmp_path: Path, checkpoint_dir: Path) -> Path:
    awq = rounded(checkpoint_dir, tmp_path / "awq")
    return convert(awq, tmp_path / "workspace", ConvertOptions("tiny"), Progress())


def test_a_package_runs_through_the_device_engine(
    tmp_path: Path, checkpoint_dir: Path, workspace: Path, options
) -> None:
    changed = EvaluateOptions(**{**options.__dict__, "quant_policy": 0})
    report = evaluate([tmp_path / "awq", workspace], changed, Progress())
    assert report.results[1].kind == "package, fp16 KV, reference"
    # The engine keeps K and V in fp16, the host's decoder in fp32.
    assert abs(report.comparisons[0].perplexity_increase) < 1e-3
    assert report.comparisons[0].kl_divergence < 1e-4
    coarse = EvaluateOptions(**{**options.__dict__, "quant_policy": 8})
    online = evaluate([tmp_path / "awq", workspace], coarse, Progress())
    assert online.results[1].kind == "package, online int8 KV, reference"
    assert online.comparisons[0].kl_divergence > report.comparisons[0].kl_divergence


def test_an_archive_is_unpacked_for_the_evaluation_alone(
    tmp_path: Path, workspace: Path, options, monkeypatch
) -> None:
    archive = tmp_path / "tiny.tgz"
    pack(workspace, archive, PackOptions(kernels="none"), Progress())
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    results = evaluate([workspace, archive], options, Progress()).results
    assert results[1].perplexity == results[0].perplexity
    assert not list(temporary.iterdir())


def test_other_tokens_cannot_be_compared(tmp_path: Path, checkpoint_dir: Path, options) -> None:
    other = tiny.write_llama(tmp_path / "other")
    tiny.write_tokenizer(other)
    path = other / "tokenizer.json"
    shuffled = json.loads(path.read_text())
    vocab = shuffled["model"]["vocab"]
    vocab["w0"], vocab["w1"] = 1, 0
    path.write_text(json.dumps(shuffled))
    with pytest.raises(UsageError, match="other cuts the text into other tokens than"):
        evaluate([checkpoint_dir, other], options, Progress())


def test_targets_that_are_none_are_refused(tmp_path: Path, checkpoint_dir: Path, options) -> None:
    with pytest.raises(UsageError, match="no target is named"):
        evaluate([], options, Progress())
    with pytest.raises(UsageError, match=r"there is no .*nowhere, name a checkpoint"):
        perplexity(tmp_path / "nowhere", options, Progress())
    with pytest.raises(PackageError, match=r"has neither config.json nor triton_models"):
        perplexity(tmp_path, options, Progress())


def test_every_target_is_opened_before_the_first_is_measured(
    tmp_path: Path, checkpoint_dir: Path, options, monkeypatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("the first target was measured")

    monkeypatch.setattr(evaluation_targets.CheckpointTarget, "prepare", measured)
    with pytest.raises(UsageError, match=r"there is no .*nowhere, name a checkpoint"):
        evaluate([checkpoint_dir, tmp_path / "nowhere"], options, Progress())
    short = tiny.write_llama(tmp_path / "short", eos_token_id=127, max_position_embeddings=16)
    tiny.write_tokenizer(short)
    with pytest.raises(UsageError, match=r"the context of .*short has 16 tokens"):
        evaluate([checkpoint_dir, short], options, Progress())


def test_a_damaged_tokenizer_of_a_package_is_refused(workspace: Path, options) -> None:
    (workspace / "triton_models" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(PackageError, match=r"tokenizer.json is not a tokenizer: it has no model"):
        perplexity(workspace, options, Progress())


def test_windows_beyond_the_context_are_refused(
    checkpoint_dir: Path, workspace: Path, options
) -> None:
    long = EvaluateOptions(**{**options.__dict__, "seqlen": 65})
    for target in (checkpoint_dir, workspace):
        with pytest.raises(UsageError, match=r"seqlen is 65, the context of .* has 64 tokens"):
            perplexity(target, long, Progress())


def test_data_sets_are_kept_in_the_cache_of_the_user(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert dataset_cache_dir() == tmp_path / "turbojet" / "datasets"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert dataset_cache_dir() == Path("/home/someone/.cache/turbojet/datasets")


@pytest.mark.parametrize("size", [1e5, 1e38])
def test_a_ruined_model_has_a_finite_perplexity(
    tmp_path: Path, checkpoint_dir: Path, options, capsys, size: float
) -> None:
    # Logits of 1e5 have a mean loss beyond the 709 of the greatest float, those of 1e38 NaN.
    ruined = tiny.write_llama(tmp_path / "ruined", dtype=torch.bfloat16)
    tensors = tiny.read_tensors(ruined)
    tensors["lm_head.weight"] *= size
    tiny.write_checkpoint(ruined, json.loads((ruined / "config.json").read_text()), tensors)
    tiny.write_tokenizer(ruined)
    argv = ["evaluate", str(checkpoint_dir), str(ruined), str(ruined), "--device", "cpu"]
    argv += ["--dataset", options.dataset, "--samples", "2", "--seqlen", "20"]

    def refuse(token: str) -> None:
        raise AssertionError(token)

    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert report["results"][0]["perplexity"] < 1000
    assert report["results"][1]["perplexity"] == MAX_FIGURE
    assert report["comparisons"][0]["perplexity_increase"] > 1e297
    assert 0 < report["comparisons"][0]["kl_divergence"] <= MAX_FIGURE
    assert cli.main(argv) == 0
    assert "1e+300" in capsys.readouterr().out


def test_figures_of_any_size_stay_short() -> None:
    assert perplexity_of(2 * math.log(7.0), 2) == pytest.approx(7.0)
    assert perplexity_of(1400.0, 2) == MAX_FIGURE  # e^700 is 1e304
    assert [capped(value) for value in (0.5, -0.5, math.inf, -math.inf, math.nan)] == [
        0.5,
        -0.5,
        MAX_FIGURE,
        MAX_FIGURE,
        MAX_FIGURE,
    ]
    assert shown(999999.25, ".3f") == "999999.250"
    assert (shown(1234567.0, ".3f"), shown(-0.5, "+.2f")) == ("1.23e+06", "-0.50")
    assert shown(1e302, "+.2f") == "+1e+302"


def test_the_command_prints_a_table_or_json(checkpoint_dir: Path, options, capsys) -> None:
    argv = ["evaluate", str(checkpoint_dir), str(checkpoint_dir), "--device", "cpu"]
    argv += ["--dataset", options.dataset, "--samples", "2", "--seqlen", "20"]
    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_samples"] == 2
    assert report["comparisons"][0]["top1_agreement"] == 1.0
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert f"{report['results'][0]['perplexity']:.3f}" in shown
    assert "+0.00%" in shown
    assert cli.main([*argv, "--work-dir", str(checkpoint_dir / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert "holds nothing to report" in said and "evaluate:" not in said  # before the first window
    assert cli.main([*argv, "--quant-policy", "3"]) == 2
    assert "quant-policy is 3, choose 0 (fp16)" in capsys.readouterr().err
