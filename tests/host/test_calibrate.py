"""Calibration writes what ``lite calibrate`` writes, and goes on where it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import save_file
from test_checkpoint import internlm2_folder
from transformers import LlamaForCausalLM

from device_runtime.errors import PackageError, UsageError
from host_tools import calibrate as calibrate_module
from host_tools.calibrate import (
    CALIBRATION_TOKENS,
    TOKEN_IDS,
    calibrate,
    read_calibration_tokens,
)
from host_tools.checkpoint import Checkpoint
from host_tools.decoder.snapshots import Snapshots
from host_tools.decoder.stream import Activations
from host_tools.options import CalibrateOptions
from host_tools.progress import Progress, Task
from host_tools.statistics import (
    INPUTS_STATS,
    KEY_STATS,
    OUTPUTS_STATS,
    VALUE_STATS,
    ChannelStatistics,
)

FILES = (INPUTS_STATS, OUTPUTS_STATS, KEY_STATS, VALUE_STATS, CALIBRATION_TOKENS)


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    folder = tiny.write_llama(tmp_path / "checkpoint")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def options(tmp_path: Path) -> CalibrateOptions:
    text = tiny.write_text(tmp_path / "words.txt")
    return CalibrateOptions(dataset=str(text), num_samples=5, seqlen=24, device="cpu")


def test_statistics_are_those_of_the_published_model(
    tmp_path: Path, checkpoint_dir: Path, options: CalibrateOptions
) -> None:
    work = calibrate(checkpoint_dir, tmp_path / "work", options, Progress())
    token_ids = read_calibration_tokens(work).token_ids
    assert token_ids.shape == (5, 24)
    model = LlamaForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32).eval()
    seen: dict[tuple[str, str], list[torch.Tensor]] = {}

    def watch(name: str):
        def hook(module, inputs, output) -> None:
            seen.setdefault((name, "in"), []).append(inputs[0].detach())
            seen.setdefault((name, "out"), []).append(output.detach())

        return hook

    for name, module in model.named_modules():
        if name.endswith(("_proj", "layernorm", "model.norm")):
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        caches = [model(row[None].long(), use_cache=True).past_key_values for row in token_ids]
    for file, side in ((INPUTS_STATS, "in"), (OUTPUTS_STATS, "out")):
        found = torch.load(work / file, weights_only=True)
        assert set(found) == {"max", "min", "mean", "absmax", "absmean"}
        names = {name for name, _ in seen if side == "out" or name.endswith("_proj")}
        for figure, modules in found.items():
            assert set(modules) == names
            for name, value in modules.items():
                samples = torch.cat(seen[name, side])
                expected = {
                    "max": samples.amax((0, 1)),
                    "min": samples.amin((0, 1)),
                    "mean": samples.mean((0, 1)),
                    "absmax": samples.abs().amax((0, 1)),
                    "absmean": samples.abs().mean((0, 1)),
                }[figure]
                assert value.dtype == torch.float16
                # fp16 keeps 11 bits; sums of another order may fall on the other side.
                torch.testing.assert_close(value.float(), expected, rtol=2e-3, atol=1e-5)
    for file, kind in ((KEY_STATS, "keys"), (VALUE_STATS, "values")):
        found = torch.load(work / file, weights_only=True)
        assert set(found) == {"max", "min", "absmax"}
        for layer in range(2):
            cached = torch.cat([getattr(cache.layers[layer], kind) for cache in caches])
            value = found["max"][f"model.layers.{layer}"]
            assert (value.dtype, value.shape) == (torch.float16, (2, 16))
            torch.testing.assert_close(value.float(), cached.amax((0, 2)), rtol=2e-3, atol=1e-5)
            value = found["min"][f"model.layers.{layer}"]
            torch.testing.assert_close(value.float(), cached.amin((0, 2)), rtol=2e-3, atol=1e-5)


def test_a_fused_module_has_the_statistics_of_its_fused_outputs(
    tmp_path: Path, options: CalibrateOptions
) -> None:
    fused, plain = internlm2_folder(tmp_path / "internlm2")
    config = {"architectures": ["LlamaForCausalLM"], "attention_bias": True, **tiny.SIZES}
    separate = tiny.write_checkpoint(tmp_path / "llama", config, plain)
    for folder in (fused, separate):
        tiny.write_tokenizer(folder)
        calibrate(folder, tmp_path / f"work-{folder.name}", options, Progress())
    of_fused = torch.load(tmp_path / "work-internlm2" / OUTPUTS_STATS, weights_only=True)["max"]
    of_separate = torch.load(tmp_path / "work-llama" / OUTPUTS_STATS, weights_only=True)["max"]
    q, k, v = (of_separate[f"model.layers.1.self_attn.{part}_proj"] for part in "qkv")
    # Per kv head of 16: its two query heads, its key head, its value head.
    expected = torch.cat([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]])
    assert torch.equal(of_fused["model.layers.1.attention.wqkv"], expected)
    assert "model.layers.1.feed_forward.w2" in of_fused
    assert "model.layers.1.ffn_norm" in of_fused
    keys = torch.load(tmp_path / "work-internlm2" / KEY_STATS, weights_only=True)
    assert set(keys["max"]) == {"model.layers.0", "model.layers.1"}


def test_channel_statistics_by_hand() -> None:
    seen = ChannelStatistics()
    seen.update(torch.tensor([[1.0, -4.0], [3.0, 1e6]]))
    seen.update(torch.tensor([[-2.0, 2.0], [2.0, 2.0]]))
    figures = seen.figures()
    assert figures["max"].tolist() == [3.0, 65504.0]
    assert figures["min"].tolist() == [-2.0, -4.0]
    assert figures["mean"][0] == 1.0  # (1 + 3 - 2 + 2) / 4
    assert figures["absmean"][0] == 2.0  # (1 + 3 + 2 + 2) / 4
    assert figures["absmax"].tolist() == [3.0, 65504.0]


class Killed(BaseException):
    pass


class KilledTask(Task):
    def _show(self) -> None:
        if self.completed == 1:
            raise Killed


class KillingProgress(Progress):
    """Dies when the first layer is done."""

    def _start(self, title: str, total: float | None, unit: str) -> Task:
        return KilledTask(title, total, unit)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("interval_s", [0.0, 60.0])
def test_a_killed_calibration_ends_with_the_same_bytes(
    tmp_path: Path, checkpoint_dir: Path, options: CalibrateOptions, monkeypatch, interval_s
) -> None:
    whole = calibrate(checkpoint_dir, tmp_path / "whole", options, Progress())
    monkeypatch.setattr(calibrate_module, "SNAPSHOT_INTERVAL_S", interval_s)
    resumed = tmp_path / "resumed"
    with pytest.raises(Killed):
        calibrate(checkpoint_dir, resumed, options, KillingProgress())
    assert not (resumed / INPUTS_STATS).exists()
    assert len(list(resumed.rglob("before-00001.states"))) == (interval_s == 0.0)
    calibrate(checkpoint_dir, resumed, options, Progress())
    assert contents(resumed) == contents(whole)
    assert not list(resumed.rglob("*.states"))


def test_a_finished_calibration_is_not_run_again(
    tmp_path: Path, checkpoint_dir: Path, options: CalibrateOptions
) -> None:
    work = calibrate(checkpoint_dir, tmp_path / "work", options, Progress())
    calibrate(checkpoint_dir, work, options, KillingProgress())
    changed = CalibrateOptions(**{**options.__dict__, "seed": 1})
    with pytest.raises(Killed):
        calibrate(checkpoint_dir, work, changed, KillingProgress())


def test_the_windows_name_their_source(
    tmp_path: Path, checkpoint_dir: Path, options: CalibrateOptions
) -> None:
    tokens = read_calibration_tokens(calibrate(checkpoint_dir, tmp_path / "w", options, Progress()))
    assert (tokens.dataset, tokens.seed) == ("words.txt", 0)


def test_windows_beyond_the_context_are_refused(tmp_path: Path, checkpoint_dir: Path) -> None:
    text = tiny.write_text(tmp_path / "words.txt")
    options = CalibrateOptions(dataset=str(text), num_samples=1, seqlen=65, device="cpu")
    with pytest.raises(UsageError, match="calib-seqlen is 65, the model's context has 64 tokens"):
        calibrate(checkpoint_dir, tmp_path / "work", options, Progress())


def test_codes_are_not_calibrated(tmp_path: Path, options: CalibrateOptions) -> None:
    folder, _ = internlm2_folder(tmp_path / "quantized", group_size=32)
    with pytest.raises(PackageError, match="is quantized already, calibrate its floating-point"):
        calibrate(folder, tmp_path / "work", options, Progress())


def test_missing_or_strange_calibration_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="cannot be read, run calibrate first"):
        read_calibration_tokens(tmp_path)
    facts = {"calibration": '{"dataset": "x", "seed": 0}'}
    save_file({TOKEN_IDS: torch.zeros(3)}, tmp_path / CALIBRATION_TOKENS, metadata=facts)
    with pytest.raises(PackageError, match=r"holds no \[num_samples, seqlen\] int32"):
        read_calibration_tokens(tmp_path)


def test_a_slow_disk_is_asked_less_often(tmp_path: Path) -> None:
    now = iter([0.0, 100.0, 130.0, 429.0, 430.0])
    snapshots = Snapshots(tmp_path, 60.0, lambda: next(now))
    snapshots.save(1, [Activations(torch.randn(2, 3, 4))])  # 100 to 130
    assert not snapshots.is_due()
    assert snapshots.is_due()  # 300 s later


def test_snapshots_are_due_after_the_interval_and_keep_the_latest(tmp_path: Path) -> None:
    now = [0.0]
    snapshots = Snapshots(tmp_path, 60.0, lambda: now[0])
    assert not snapshots.is_due()
    now[0] = 60.0
    assert snapshots.is_due()
    streams = [Activations(torch.randn(2, 3, 4)), Activations(torch.randn(1, 2, 4))]
    snapshots.save(3, streams)
    snapshots.save(7, streams)
    assert not snapshots.is_due()
    assert [path.name for path in tmp_path.iterdir()] == ["before-00007.states"]
    loaded = [Activations(torch.zeros(2, 3, 4)), Activations(torch.zeros(1, 2, 4))]
    assert snapshots.load(loaded) == 7
    assert all(torch.equal(a.states, b.states) for a, b in zip(loaded, streams, strict=True))
    assert snapshots.load(loaded[:1]) == 0


def test_the_statistics_of_a_checkpoint_name_all_its_modules(
    tmp_path: Path, checkpoint_dir: Path, options: CalibrateOptions
) -> None:
    work = calibrate(checkpoint_dir, tmp_path / "work", options, Progress())
    names = set(torch.load(work / OUTPUTS_STATS, weights_only=True)["max"])
    checkpoint = Checkpoint.open(checkpoint_dir)
    modules = {name.removesuffix(".weight") for name in checkpoint.names()}
    assert names == modules - {"model.embed_tokens", "lm_head"}
