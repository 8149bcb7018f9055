"""Quantize writes an AWQ folder that others load, and ends with the same bytes after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import save_file
from test_checkpoint import internlm2_folder

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import int4
from host_tools import quantize as quantize_module
from host_tools import quantize_layers
from host_tools.awq import linear_solver
from host_tools.awq.awq_folder import LayerFiles
from host_tools.awq.grid import Grid
from host_tools.calibrate import CALIBRATION_TOKENS, TOKEN_IDS, calibrate
from host_tools.checkpoint import Checkpoint, QuantizedLinear
from host_tools.checkpoint.families import LINEARS
from host_tools.decoder import snapshots
from host_tools.decoder.compact import CompactActivations
from host_tools.layer_records import read_quantize_record
from host_tools.layer_run import LayerRun
from host_tools.options import CalibrateOptions, QuantizeOptions
from host_tools.origin import read_origin
from host_tools.progress import Progress
from host_tools.quantize import quantize, valid_group_sizes
from host_tools.tap_passes import TapPasses

OPTIONS = QuantizeOptions(group_size=32, device="cpu")
RTN = QuantizeOptions(group_size=32, method="rtn", device="cpu")
REPOSITORY = Path(__file__).resolve().parents[2]


def calibrated(folder: Path, work: Path) -> Path:
    tiny.write_tokenizer(folder)
    text = tiny.write_text(folder.parent / "words.txt")
    options = CalibrateOptions(dataset=str(text), num_samples=6, seqlen=32, device="cpu")
    return calibrate(folder, work, options, Progress())


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    return tiny.write_llama(tmp_path / "checkpoint", tie_word_embeddings=True)


@pytest.fixture
def work_dir(tmp_path: Path, checkpoint_dir: Path) -> Path:
    return calibrated(checkpoint_dir, tmp_path / "work")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_folder_is_a_standard_awq_checkpoint(
    tmp_path: Path, checkpoint_dir: Path, work_dir: Path
) -> None:
    (checkpoint_dir / "generation_config.json").write_text("{}")
    (checkpoint_dir / "modeling_tiny.py").write_text("raise SystemExit")
    awq = quantize(checkpoint_dir, work_dir, tmp_path / "awq", OPTIONS, Progress())
    assert sorted(contents(awq)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_tiny.py",
        "tokenizer.json",
    ]
    config = json.loads((awq / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
    }
    assert config["torch_dtype"] == "float16"
    assert config["hidden_size"] == 64
    tensors = tiny.read_tensors(awq)
    module = "model.layers.1.mlp.down_proj"
    facts = {kind: tensors[f"{module}.{kind}"] for kind in ("qweight", "qzeros", "scales")}
    assert (facts["qweight"].dtype, facts["qweight"].shape) == (torch.int32, (96, 8))
    assert (facts["qzeros"].dtype, facts["qzeros"].shape) == (torch.int32, (3, 8))
    assert (facts["scales"].dtype, facts["scales"].shape) == (torch.float16, (3, 64))
    assert "lm_head.weight" not in tensors
    origin = read_origin(awq, is_quantized=True)
    assert origin.method == "awq"
    assert (origin.provenance.calibration.dataset, origin.provenance.calibration.seqlen) == (
        "words.txt",
        32,
    )


def test_the_file_dequantizes_to_the_very_values_that_were_chosen(
    tmp_path: Path, checkpoint_dir: Path, work_dir: Path
) -> None:
    awq = quantize(checkpoint_dir, work_dir, tmp_path / "rtn", RTN, Progress())
    source, stored = Checkpoint.open(checkpoint_dir), Checkpoint.open(awq)
    for layer in range(2):
        for name in LINEARS:
            weight = source.layer(layer).linear(name).weight.float()
            grid = Grid.spanning(weight, 32)
            linear = stored.layer(layer).linear(name)
            assert isinstance(linear, QuantizedLinear)
            assert torch.equal(linear.weight.float(), grid.values(grid.codes(weight)))


def test_other_parts_are_kept_in_fp16(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "checkpoint", dtype=torch.float32)
    awq = quantize(folder, tmp_path / "work", tmp_path / "awq", RTN, Progress())
    source, stored = Checkpoint.open(folder), Checkpoint.open(awq)
    assert torch.equal(stored.embedding(), source.embedding().half())
    assert torch.equal(stored.head(), source.head().half())
    assert torch.equal(stored.final_norm(), source.final_norm().half())
    assert torch.equal(stored.layer(1).ffn_norm, source.layer(1).ffn_norm.half())


def test_half_a_character_in_a_config_is_written_as_it_was(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "checkpoint", note="é\ud800")
    awq = quantize(folder, tmp_path / "work", tmp_path / "awq", RTN, Progress())
    text = (awq / "config.json").read_text(encoding="utf-8")
    assert r'"note": "é\ud800"' in text
    assert json.loads(text)["note"] == "é\ud800"


def test_a_fused_module_is_fused_again(tmp_path: Path) -> None:
    folder, _ = internlm2_folder(tmp_path / "internlm2")
    work = calibrated(folder, tmp_path / "work")
    awq = quantize(folder, work, tmp_path / "awq", OPTIONS, Progress())
    stored = Checkpoint.open(awq)
    layer = stored.layer(0)
    words = stored.tensor("model.layers.0.attention.wqkv.qweight")
    # The second kv head's key follows q0 q1 k0 v0 q2 q3 of 16 columns each.
    columns = int4.unpack_awq(words.numpy())[:, 96:112]
    assert layer.k.codes[:, 16:].numpy().tobytes() == columns.tobytes()
    source = Checkpoint.open(folder).layer(0)
    assert layer.o.bias.tolist() == source.o.bias.tolist()
    scaled = source.v.bias.float() / layer.v.bias.float()
    assert scaled.std() > 0.01


def test_awq_is_nearer_to_the_original_than_rounding(
    tmp_path: Path, checkpoint_dir: Path, work_dir: Path
) -> None:
    from test_decoder import our_logits, token_windows

    expected = our_logits(checkpoint_dir, token_windows())
    errors = {}
    for name, options in (("awq", OPTIONS), ("rtn", RTN)):
        folder = quantize(checkpoint_dir, work_dir, tmp_path / name, options, Progress())
        errors[name] = float((our_logits(folder, token_windows()) - expected).pow(2).mean())
    assert errors["awq"] < 0.9 * errors["rtn"]


KILLED_RUN = """
import sys, threading
from pathlib import Path
from host_tools.decoder import snapshots
from host_tools.options import QuantizeOptions
from host_tools.progress import Progress
from host_tools.quantize import quantize
from host_tools.awq.awq_folder import LayerFiles
where, stop_at, devices = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
def stopping(function, after):
    calls, lock = [0], threading.Lock()
    def stopped(*args, **kwargs):
        with lock:
            calls[0] += 1
            is_last = calls[0] == stop_at
        result = function(*args, **kwargs) if after else None
        if is_last:
            print("stopped", flush=True)
            sys.stdin.readline()
        return result if after else function(*args, **kwargs)
    return stopped
if where == "written":
    LayerFiles.write = stopping(LayerFiles.write, True)
elif where == "packed":
    LayerFiles.write = stopping(LayerFiles.write, False)
else:
    from host_tools.awq.layer_solver import LayerSolver as solver
    solver.solve = stopping(solver.solve, False)
snapshots.WORK_PER_WRITE = float(sys.argv[7])
options = QuantizeOptions(group_size=32, device="cpu", devices=("cpu",) * devices)
quantize(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), options, Progress())
"""


@pytest.mark.parametrize(
    ("where", "stop_at", "num_devices", "work_per_write"),
    [
        ("written", 2, 0, 1e9),
        ("packed", 2, 0, 0.0),
        # The eleventh tap is the third of the third layer.
        ("searched", 11, 0, 1e9),
        ("searched", 11, 2, 0.0),
    ],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    four_layers: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch,
    where: str,
    stop_at: int,
    num_devices: int,
    work_per_write: float,
) -> None:
    folder, calibrated_dir, whole = four_layers
    work, killed = shutil.copytree(calibrated_dir, tmp_path / "work"), tmp_path / "killed"
    arguments = [folder, work, killed, where, str(stop_at), str(num_devices), str(work_per_write)]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "stopped\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not contents(killed)
    finished = {path.name for path in work.rglob("layer-*.safetensors")}
    written = []
    write = LayerFiles.write

    def counted(self, layer: int, content: bytes) -> None:
        written.append(layer)
        write(self, layer, content)

    monkeypatch.setattr(LayerFiles, "write", counted)
    quantize(folder, work, killed, OPTIONS, Progress())
    # Each layer is searched by one of the two runs, none by both.
    assert {f"layer-{layer:05d}.safetensors" for layer in written}.isdisjoint(finished)
    assert len(written) + len(finished) == 4
    # Layers are written in order: the second was, the second was not, the third was not.
    assert written == {"written": [2, 3], "packed": [1, 2, 3], "searched": [2, 3]}[where]
    assert contents(killed) == contents(whole)
    assert not list(work.rglob("layer-*"))
    records = read_quantize_record(work).layers
    assert [record.layer for record in records] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A checkpoint, its calibration and its AWQ folder."""
    base = tmp_path_factory.mktemp("four_layers")
    folder = tiny.write_llama(base / "checkpoint", num_hidden_layers=4)
    work = calibrated(folder, base / "work")
    calibration = shutil.copytree(work, base / "calibration")
    return folder, calibration, quantize(folder, work, base / "awq", OPTIONS, Progress())


@pytest.mark.parametrize("num_devices", [2, 4])
def test_several_devices_give_the_bytes_of_one(
    four_layers: tuple[Path, Path, Path], tmp_path: Path, monkeypatch, num_devices: int
) -> None:
    folder, calibration, whole = four_layers
    if num_devices == 4:
        monkeypatch.setitem(linear_solver.MAX_ROWS, "cpu", 16)
    work = shutil.copytree(calibration, tmp_path / "work")
    options = replace(OPTIONS, devices=("cpu",) * num_devices)
    assert contents(quantize(folder, work, tmp_path / "awq", options, Progress())) == contents(
        whole
    )
    rounded = [
        quantize(
            folder, work, tmp_path / f"rtn{len(devices)}", replace(RTN, devices=devices), Progress()
        )
        for devices in ((), options.devices)
    ]
    assert contents(rounded[0]) == contents(rounded[1])


def test_a_snapshot_beyond_a_layer_that_is_missing_is_not_used(
    four_layers: tuple[Path, Path, Path], tmp_path: Path, monkeypatch
) -> None:
    folder, calibration, whole = four_layers
    work = shutil.copytree(calibration, tmp_path / "work")
    monkeypatch.setattr(snapshots, "WORK_PER_WRITE", 0.0)
    write = LayerFiles.write

    def failing(self, layer: int, content: bytes) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        write(self, layer, content)

    monkeypatch.setattr(LayerFiles, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, work, tmp_path / "awq", OPTIONS, Progress())
    assert [path.name for path in work.rglob("*.states")] == ["before-00002.states"]
    next(work.rglob("layer-00000.safetensors")).unlink()
    monkeypatch.setattr(LayerFiles, "write", write)
    assert contents(quantize(folder, work, tmp_path / "awq", OPTIONS, Progress())) == contents(
        whole
    )


def test_finished_layers_are_passed_as_they_were_searched_where_states_are_rounded(
    four_layers: tuple[Path, Path, Path], tmp_path: Path, monkeypatch
) -> None:
    """A GPU stores states in 11 bits, after each half of a layer; so must a run that goes on."""
    folder, calibration, _ = four_layers

    def compact(model, windows, devices, *_):
        shape = (*windows.shape, model.hidden_size)
        return [CompactActivations.make(shape, device) for device in devices]

    monkeypatch.setattr(quantize_layers, "place_activations", compact)
    monkeypatch.setattr(snapshots, "WORK_PER_WRITE", 1e9)
    seen: dict[str, list[bytes]] = {"whole": [], "resumed": []}
    follow, pass_by = TapPasses.follow, LayerRun.pass_by

    def states(passes: TapPasses) -> bytes:
        parts = [*passes.exact.parts(), *passes.quantized.parts()]
        return b"".join(part.numpy().tobytes() for part in parts)

    def followed(self, block, stored):
        follow(self, block, stored)
        if block == "ffn":
            seen["whole"].append(states(self))

    def passed_by(self, ready, stored):
        pass_by(self, ready, stored)
        seen["resumed"].append(states(self.passes))

    monkeypatch.setattr(TapPasses, "follow", followed)
    monkeypatch.setattr(LayerRun, "pass_by", passed_by)
    work = shutil.copytree(calibration, tmp_path / "work")
    write = LayerFiles.write

    def failing(self, layer: int, content: bytes) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        write(self, layer, content)

    monkeypatch.setattr(LayerFiles, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, work, tmp_path / "awq", OPTIONS, Progress())
    monkeypatch.setattr(LayerFiles, "write", write)
    quantize(folder, work, tmp_path / "awq", OPTIONS, Progress())
    assert len(seen["resumed"]) == 2
    assert seen["resumed"] == seen["whole"][:2]


def test_layers_that_were_computed_elsewhere_are_computed_again(
    four_layers: tuple[Path, Path, Path], tmp_path: Path, monkeypatch
) -> None:
    """A GPU's kernels give other last bits than torch's operations: no layer of theirs is kept."""
    folder, calibration, whole = four_layers
    work = shutil.copytree(calibration, tmp_path / "work")
    write = LayerFiles.write

    def failing(self, layer: int, content: bytes) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        write(self, layer, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerFiles, "write", failing)
        patch.setattr(quantize_module, "is_fused", lambda device: True)
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, work, tmp_path / "awq", OPTIONS, Progress())
    assert len(list(work.rglob("layer-*.safetensors"))) == 2
    for path in work.rglob("layer-*.safetensors"):
        path.write_bytes(b"other bits")
    told: list[str] = []
    progress = Progress()
    progress.note = told.append  # type: ignore[method-assign]
    awq = quantize(folder, work, tmp_path / "awq", OPTIONS, progress)
    place = read_quantize_record(work).device
    assert told[0] == (
        f"quantize: an earlier run computed on {place}, searched by Triton kernels, this one "
        f"computes on {place}, whose last bits differ; it begins again"
    )
    assert contents(awq) == contents(whole)


def test_the_times_are_told_and_kept(four_layers: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, calibration, _ = four_layers
    work = shutil.copytree(calibration, tmp_path / "work")
    told: list[str] = []
    progress = Progress()
    progress.note = told.append  # type: ignore[method-assign]
    awq = quantize(folder, work, tmp_path / "awq", OPTIONS, progress)
    assert told[-1].startswith("quantize took ")
    assert "search" in told[-1]
    record = json.loads((awq / ".turbojet" / "quantize.json").read_text())
    seconds = record["times"]["seconds"]
    assert {"reading", "forward", "search", "packing", "disk", "hashing", "other"} <= set(seconds)
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total, abs=0.01)  # rounded to 1 ms each
    layers = read_quantize_record(work)
    assert (layers.method, layers.group_size) == ("awq", 32)
    capability = torch.backends.cpu.get_cpu_capability()
    assert layers.device == f"cpu ({capability}), torch {torch.__version__}"
    assert all(record.seconds.search_s > 0 for record in layers.layers)
    searched = sum(record.seconds.search_s for record in layers.layers)
    assert searched == pytest.approx(seconds["search"], abs=0.01)


def test_a_finished_run_is_kept_and_changed_settings_replace_it(
    tmp_path: Path, checkpoint_dir: Path, work_dir: Path
) -> None:
    awq = quantize(checkpoint_dir, work_dir, tmp_path / "awq", OPTIONS, Progress())
    before = (awq / "model.safetensors").stat().st_mtime_ns
    quantize(checkpoint_dir, work_dir, awq, OPTIONS, Progress())
    assert (awq / "model.safetensors").stat().st_mtime_ns == before
    quantize(checkpoint_dir, work_dir, awq, RTN, Progress())
    assert (awq / "model.safetensors").stat().st_mtime_ns != before
    assert read_origin(awq, is_quantized=True).method == "rtn"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "awq",
        "checkpoint",
        "words.txt",
        "work",
    ]


def test_somebody_elses_folder_is_not_replaced(
    tmp_path: Path, checkpoint_dir: Path, work_dir: Path
) -> None:
    (tmp_path / "awq").mkdir()
    (tmp_path / "awq" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="awq exists and quantize did not write it"):
        quantize(checkpoint_dir, work_dir, tmp_path / "awq", OPTIONS, Progress())
    assert (tmp_path / "awq" / "thesis.tex").read_text() == "precious"


def test_group_sizes_that_do_not_divide_are_refused(
    tmp_path: Path, checkpoint_dir: Path, work_dir: Path
) -> None:
    options = QuantizeOptions(group_size=64, device="cpu")
    complaint = r"w-group-size 64 does not divide all inputs .*\(64, 64 and 96\), use 32"
    with pytest.raises(UsageError, match=complaint):
        quantize(checkpoint_dir, work_dir, tmp_path / "awq", options, Progress())
    assert valid_group_sizes(Checkpoint.open(checkpoint_dir).model) == (32,)
    odd = tiny.write_llama(tmp_path / "odd", intermediate_size=80)
    with pytest.raises(UsageError, match="no group size does"):
        quantize(odd, work_dir, tmp_path / "awq", RTN, Progress())


def test_quantize_needs_a_calibration_and_floats(
    tmp_path: Path, checkpoint_dir: Path, work_dir: Path
) -> None:
    with pytest.raises(PackageError, match="holds no calibration, run calibrate first"):
        quantize(checkpoint_dir, tmp_path / "empty", tmp_path / "awq", OPTIONS, Progress())
    awq = quantize(checkpoint_dir, work_dir, tmp_path / "awq", OPTIONS, Progress())
    with pytest.raises(PackageError, match="is quantized already, quantize its floating-point"):
        quantize(awq, work_dir, tmp_path / "again", OPTIONS, Progress())


def test_windows_of_another_vocabulary_are_refused(
    tmp_path: Path, checkpoint_dir: Path, work_dir: Path
) -> None:
    facts = {"calibration": '{"dataset": "x", "seed": 0}'}
    token_ids = torch.full((1, 8), 128, dtype=torch.int32)
    save_file({TOKEN_IDS: token_ids}, work_dir / CALIBRATION_TOKENS, metadata=facts)
    with pytest.raises(PackageError, match="token id 128, the embedding has 128 rows"):
        quantize(checkpoint_dir, work_dir, tmp_path / "awq", OPTIONS, Progress())
