"""Calibration writes what ``lite calibrate`` writes, and goes on where it was killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import save_file
from test_checkpoint import internlm2_folder
from transformers import LlamaForCausalLM

from device_runtime.errors import DeviceError, PackageError, UsageError
from device_runtime.package_format import durable
from host_tools.calibrate import (
    CALIBRATION_TOKENS,
    TOKEN_IDS,
    calibrate,
    read_calibration_tokens,
)
from host_tools.checkpoint import Checkpoint
from host_tools.decoder import snapshots as snapshots_module
from host_tools.decoder.snapshots import Snapshots
from host_tools.decoder.stream import Activations, LayerRunner
from host_tools.options import CalibrateOptions
from host_tools.progress import Progress, Task
from host_tools.statistics import (
    INPUTS_STATS,
    KEY_STATS,
    OUTPUTS_STATS,
    VALUE_STATS,
    ChannelStatistics,
)

REPOSITORY = Path(__file__).resolve().parents[2]
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


def wait_until(is_so) -> None:
    """Give a thread that follows the caller up to ten seconds."""
    until_s = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.001)


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


@pytest.mark.parametrize("work_per_write", [0.0, 1e9])
def test_an_interrupted_calibration_ends_with_the_same_bytes(
    tmp_path: Path, checkpoint_dir: Path, options: CalibrateOptions, monkeypatch, work_per_write
) -> None:
    whole = calibrate(checkpoint_dir, tmp_path / "whole", options, Progress())
    monkeypatch.setattr(snapshots_module, "WORK_PER_WRITE", work_per_write)
    resumed = tmp_path / "resumed"
    with pytest.raises(Killed):
        calibrate(checkpoint_dir, resumed, options, KillingProgress())
    assert not (resumed / INPUTS_STATS).exists()
    assert len(list(resumed.rglob("before-00001.states"))) == (work_per_write == 0.0)
    calibrate(checkpoint_dir, resumed, options, Progress())
    assert contents(resumed) == contents(whole)
    assert not list(resumed.rglob("*.states"))


KILLED_RUN = """
import sys, time
from pathlib import Path
from device_runtime.package_format import durable
from host_tools.calibrate import calibrate
from host_tools.decoder import snapshots
from host_tools.decoder.stream import LayerRunner
from host_tools.options import CalibrateOptions
from host_tools.progress import Progress
work, stop_at = Path(sys.argv[2]), int(sys.argv[4])
advance, calls = LayerRunner.advance, [0]
def stopping(*args, **kwargs):
    calls[0] += 1
    if calls[0] == stop_at:
        print("stopped", flush=True)
        sys.stdin.readline()
    advance(*args, **kwargs)
    time.sleep(0.2)
LayerRunner.advance = stopping
# A layer that takes far longer than saving its states, whatever else the disk has to do.
snapshots.WORK_PER_WRITE = 0.0
durable.sync_file = durable.sync_folder = lambda path: None
options = CalibrateOptions(dataset=sys.argv[3], num_samples=5, seqlen=24, device="cpu")
calibrate(Path(sys.argv[1]), work, options, Progress())
"""


def test_a_killed_calibration_goes_on_with_the_very_layer(
    tmp_path: Path, options: CalibrateOptions, monkeypatch
) -> None:
    layer = 2
    folder = tiny.write_llama(tmp_path / "checkpoint", num_hidden_layers=4)
    tiny.write_tokenizer(folder)
    work = tmp_path / "work"
    arguments = [folder, work, options.dataset, str(layer + 1)]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "stopped\n"
    wait_until(lambda: list(work.rglob(f"before-{layer:05d}.states")))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    layers: list[int] = []
    advance = LayerRunner.advance

    def counted(*args, **kwargs) -> None:
        layers.append(len(layers))
        advance(*args, **kwargs)

    monkeypatch.setattr(LayerRunner, "advance", counted)
    calibrate(folder, work, options, Progress())
    assert len(layers) == 4 - layer
    whole = calibrate(folder, tmp_path / "whole", options, Progress())
    assert contents(work) == contents(whole)


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


def streams(seed: int = 0) -> list[Activations]:
    """Two, of 24 and 8 values: 128 bytes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Activations(torch.randn(shape, generator=generator)) for shape in ((2, 3, 4), (1, 2, 4))
    ]


def test_snapshots_wait_for_twenty_times_what_writing_takes(tmp_path: Path) -> None:
    now = [0.0]
    with Snapshots(tmp_path, streams(), lambda: now[0]) as snapshots:
        # 128 bytes at 1 GB/s are 128 ns, of which 20 times is 2.56 us.
        assert not snapshots.is_due()
        now[0] = 3e-6
        assert snapshots.is_due()
        writing = torch.Tensor.cpu

        def slow(tensor: torch.Tensor) -> torch.Tensor:
            now[0] += 1.0
            return writing(tensor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", slow)
            snapshots.save(1)  # two samples and one: 3 s
        wait_until((tmp_path / "before-00001.states").is_file)
        now[0] += 59.0
        assert not snapshots.is_due()
        now[0] += 1.5
        wait_until(snapshots.is_due)


def test_a_slow_disk_has_half_of_its_time_for_others(tmp_path: Path, monkeypatch) -> None:
    now, may_end = [0.0], threading.Event()

    def slow(path: Path) -> None:
        assert may_end.wait(10)
        now[0] += 100.0

    monkeypatch.setattr(durable, "sync_file", slow)
    with Snapshots(tmp_path, streams(), lambda: now[0]) as snapshots:
        snapshots.save(1)
        assert not snapshots.is_due()  # the disk is at it
        assert [path.name for path in tmp_path.iterdir()] == ["next.states.part"]
        may_end.set()
        wait_until((tmp_path / "before-00001.states").is_file)
        now[0] = 199.0
        assert not snapshots.is_due()
        now[0] = 201.0
        wait_until(snapshots.is_due)


def test_the_latest_snapshot_is_kept_with_its_notes(tmp_path: Path) -> None:
    saved = streams()
    with Snapshots(tmp_path, saved) as snapshots:
        assert snapshots.load() == (0, b"")
        snapshots.save(3, b"older")
        snapshots.save(7, b"statistics")
    assert [path.name for path in tmp_path.iterdir()] == ["before-00007.states"]
    loaded = streams(seed=1)
    assert Snapshots(tmp_path, loaded).load() == (7, b"statistics")
    assert all(torch.equal(a.states, b.states) for a, b in zip(loaded, saved, strict=True))
    # 96 of the 128 bytes, the others are no notes.
    assert Snapshots(tmp_path, loaded[:1]).load() == (0, b"")


def test_a_power_cut_finds_a_snapshot_at_any_moment(tmp_path: Path, monkeypatch) -> None:
    names: list[list[str]] = []
    monkeypatch.setattr(
        durable, "sync_folder", lambda path: names.append(sorted(os.listdir(tmp_path)))
    )
    with Snapshots(tmp_path, streams()) as snapshots:
        snapshots.save(3)
        snapshots.save(7)
    # What is deleted before its successor's name is on the disk may leave neither.
    assert names[-1] == ["before-00003.states", "before-00007.states"]


@pytest.mark.parametrize("is_written", [False, True])
def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path, monkeypatch, is_written) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Snapshots(tmp_path, streams()) as snapshots:
        monkeypatch.setattr(*((durable, "sync_file", full) if is_written else (Path, "open", full)))
        with pytest.raises(DeviceError, match=r"cannot write .*before-00001.states: No space left"):
            snapshots.save(1)
            wait_until(snapshots.is_due)


def test_the_statistics_of_a_checkpoint_name_all_its_modules(
    tmp_path: Path, checkpoint_dir: Path, options: CalibrateOptions
) -> None:
    work = calibrate(checkpoint_dir, tmp_path / "work", options, Progress())
    names = set(torch.load(work / OUTPUTS_STATS, weights_only=True)["max"])
    checkpoint = Checkpoint.open(checkpoint_dir)
    modules = {name.removesuffix(".weight") for name in checkpoint.names()}
    assert names == modules - {"model.embed_tokens", "lm_head"}
