"""Calibrate and quantize on a GPU: near the CPU's result, and the same bytes however they run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="calibrate and quantize need torch")
pytest.importorskip("safetensors", reason="calibrate and quantize need safetensors")

from device_runtime.package_format.model_config import ModelConfig  # noqa: E402
from host_tools.awq.linear_solver import search_bytes  # noqa: E402
from host_tools.calibrate import CALIBRATION_TOKENS, calibrate  # noqa: E402
from host_tools.checkpoint import Checkpoint  # noqa: E402
from host_tools.checkpoint.synthetic import write_synthetic  # noqa: E402
from host_tools.decoder import devices as devices_module  # noqa: E402
from host_tools.decoder.devices import working_bytes  # noqa: E402
from host_tools.decoder.prefetch import ready_layers  # noqa: E402
from host_tools.decoder.stream import Activations, LayerRunner, head_logits  # noqa: E402
from host_tools.measure_quantize import PUBLISHED, write_words  # noqa: E402
from host_tools.options import CalibrateOptions, QuantizeOptions  # noqa: E402
from host_tools.phase_times import PhaseTimes  # noqa: E402
from host_tools.progress import Progress  # noqa: E402
from host_tools.quantize import quantize  # noqa: E402
from host_tools.statistics import INPUTS_STATS, KEY_STATS, OUTPUTS_STATS  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1280,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
}
ON_GPU = QuantizeOptions(group_size=128, device="cuda")


def calibrated(folder: Path, work: Path, device: str) -> Path:
    text = write_words(folder, 1000, 40_000)
    options = CalibrateOptions(str(text), num_samples=16, seqlen=512, device=device)
    return calibrate(folder, work, options, Progress())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A checkpoint, its calibration on the GPU and its AWQ folder."""
    base = tmp_path_factory.mktemp("model")
    folder = write_synthetic(base / "checkpoint", CONFIG)
    work = calibrated(folder, base / "work", "cuda")
    calibration = shutil.copytree(work, base / "calibration")
    return folder, calibration, quantize(folder, work, base / "awq", ON_GPU, Progress())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_statistics_are_those_of_the_cpu(model, tmp_path: Path) -> None:
    folder, calibration, _ = model
    work = calibrated(shutil.copytree(folder, tmp_path / "checkpoint"), tmp_path / "work", "cpu")
    assert (work / CALIBRATION_TOKENS).read_bytes() == (
        calibration / CALIBRATION_TOKENS
    ).read_bytes()
    for name in (INPUTS_STATS, OUTPUTS_STATS, KEY_STATS):
        expected = torch.load(work / name, weights_only=True)
        found = torch.load(calibration / name, weights_only=True)
        for figure, modules in expected.items():
            for module, value in modules.items():
                scale = value.float().abs().max()
                error = (found[figure][module].float() - value.float()).abs().max() / scale
                # Products of 11-bit factors through four layers.
                assert error < 1e-2, (name, figure, module)


def test_codes_are_as_good_as_the_cpus(model, tmp_path: Path) -> None:
    folder, calibration, on_gpu = model
    work = shutil.copytree(calibration, tmp_path / "work")
    options = replace(ON_GPU, device="cpu")
    on_cpu = quantize(folder, work, tmp_path / "awq", options, Progress())
    token_ids = torch.arange(256, dtype=torch.int32)[None] * 3
    expected = logits(folder, token_ids)
    errors = [(logits(path, token_ids) - expected).norm() for path in (on_gpu, on_cpu)]
    assert errors[0] < 1.05 * errors[1]


def logits(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    cpu = torch.device("cpu")
    checkpoint = Checkpoint.open(folder)
    activations = Activations.embed(checkpoint, token_ids)
    runner = LayerRunner(checkpoint, token_ids.shape[1], cpu)
    for index in range(checkpoint.model.num_hidden_layers):
        runner.advance(runner.layer(index), activations)
    return head_logits(checkpoint, activations.states[0], cpu)


def gpu_numbers() -> list[tuple[str, ...]]:
    numbers = [("0",), ("0", "0")]
    if torch.cuda.device_count() > 1:
        numbers += [("0", "1"), ("1",)]
    return numbers


@pytest.mark.parametrize("devices", gpu_numbers())
def test_every_choice_of_devices_gives_the_same_bytes(model, tmp_path: Path, devices) -> None:
    folder, calibration, whole = model
    work = shutil.copytree(calibration, tmp_path / "work")
    options = replace(ON_GPU, devices=devices)
    assert contents(quantize(folder, work, tmp_path / "a", options, Progress())) == contents(whole)


def test_activations_in_host_memory_give_the_same_bytes(model, tmp_path, monkeypatch) -> None:
    folder, calibration, whole = model
    work = shutil.copytree(calibration, tmp_path / "work")
    monkeypatch.setattr(devices_module.torch.cuda, "mem_get_info", lambda device: (0, 1 << 40))
    assert contents(quantize(folder, work, tmp_path / "a", ON_GPU, Progress())) == contents(whole)


KILLED_RUN = """
import sys
from pathlib import Path
from host_tools.awq.awq_folder import LayerFiles
from host_tools.decoder import snapshots
from host_tools.options import QuantizeOptions
from host_tools.progress import Progress
from host_tools.quantize import quantize
write = LayerFiles.write
def stopping(self, layer, content):
    write(self, layer, content)
    if layer == 1:
        print("stopped", flush=True)
        sys.stdin.readline()
LayerFiles.write = stopping
snapshots.WORK_PER_WRITE = float(sys.argv[4])
options = QuantizeOptions(group_size=128, device="cuda")
quantize(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), options, Progress())
"""


@pytest.mark.parametrize("work_per_write", [0.0, 1e9])
def test_a_killed_run_ends_with_the_same_bytes(
    model, tmp_path: Path, work_per_write: float
) -> None:
    folder, calibration, whole = model
    work, killed = shutil.copytree(calibration, tmp_path / "work"), tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, folder, work, killed, str(work_per_write)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "stopped\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not contents(killed)
    assert contents(quantize(folder, work, killed, ON_GPU, Progress())) == contents(whole)


def test_layers_read_ahead_are_those_of_the_checkpoint(model) -> None:
    checkpoint = Checkpoint.open(model[0])
    for ready in ready_layers(checkpoint, range(4), torch.device("cuda", 0), PhaseTimes()):
        expected = checkpoint.layer(ready.index)
        for name in ("q", "o", "up", "down"):
            weight = ready.layer.weights.linear(name).weight
            assert torch.equal(weight.cpu(), expected.linear(name).weight.float())


def test_a_layer_of_a_7b_stays_below_its_plan(tmp_path: Path) -> None:
    config = {**PUBLISHED["llama-2-7b"], "num_hidden_layers": 2}
    folder = write_synthetic(tmp_path / "checkpoint", config)
    text = write_words(folder, 32000, 40_000)
    options = CalibrateOptions(str(text), num_samples=8, seqlen=2048, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    calibrate(folder, tmp_path / "work", options, Progress())
    quantize(folder, tmp_path / "work", tmp_path / "awq", ON_GPU, Progress())
    shape: ModelConfig = Checkpoint.open(folder).model
    stream = 8 * 2048 * (2 * 4096 + 4)
    needed = working_bytes(shape, 2, 2048, search_bytes(shape, 128))
    assert torch.cuda.max_memory_allocated() < 2 * stream + needed
    # 128 windows are 16 times as many, and then one of the two streams lies in host memory.
    assert torch.cuda.max_memory_allocated() + (16 - 2) * stream < 8e9
