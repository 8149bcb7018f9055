"""Runs a checkpoint over a calibration set and writes down what its activations look like."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.durable import write_atomically
from host_tools.checkpoint import Checkpoint
from host_tools.datasets import WindowRequest, calibration_windows
from host_tools.decoder.devices import choose_devices, place_activations, tensor_cores
from host_tools.decoder.layer import rms_norm
from host_tools.decoder.prefetch import ready_layers
from host_tools.decoder.snapshots import Snapshots
from host_tools.decoder.stream import Activations, LayerRunner
from host_tools.options import CalibrateOptions
from host_tools.output_folder import check_outside, scratch_folder
from host_tools.phase_times import DISK, FORWARD, HASHING, READING, WINDOWS, PhaseTimes
from host_tools.progress import Progress
from host_tools.stage import RECORD_DIR, Stage, exclusive
from host_tools.statistics import (
    ChannelStatistics,
    LayerStatistics,
    Statistics,
    final_norm_statistics,
    merge,
    write_statistics,
)
from host_tools.tokenizer_folder import SourceTokenizer
from host_tools.unfinished import computed_on, keep_finished

CALIBRATION_TOKENS = "calibration_tokens.safetensors"
TOKEN_IDS = "token_ids"
_FACTS = "calibration"
VERSION = 2
"""Counted up when the same inputs start to give other statistics."""


def calibrate(
    checkpoint_dir: Path, work_dir: Path, options: CalibrateOptions, progress: Progress
) -> Path:
    """Write the statistics of spec section 4.1 and the calibration's token ids.

    One decoder layer, the embedding's rows in use and the activations are in memory; large
    activations are spilled into ``work_dir``. A killed run goes on with the layer that it was at,
    or a few before it where saving the activations takes longer than the layers do.

    Args:
        checkpoint_dir: a checkpoint in floating point.
        work_dir: is made; gets the four statistics files and ``calibration_tokens.safetensors``.
        options: calibration set, its size and the device.
        progress: hears of every layer.

    Returns:
        ``work_dir``.

    Raises:
        PackageError: the checkpoint is damaged or already quantized.
        UsageError: the calibration set is too short, the windows exceed the model's context, or
            ``work_dir`` lies in the checkpoint.
        DeviceError: the device is not there.
    """
    check_outside(checkpoint_dir, work_dir)
    times = PhaseTimes()
    stage = calibrate_stage(checkpoint_dir, work_dir, options)
    with exclusive(work_dir):
        with times.phase(HASHING):
            is_finished = stage.is_finished()
        if is_finished:
            progress.note(f"calibrate: {work_dir} is up to date")
            return work_dir
        stage.forget()
        checkpoint = Checkpoint.open(checkpoint_dir)
        if checkpoint.is_quantized:
            raise PackageError(
                f"{checkpoint_dir} is quantized already, calibrate its floating-point original"
            )
        with times.phase(WINDOWS):
            token_ids = _draw_windows(checkpoint, options, work_dir, progress)
        with scratch_folder(work_dir / RECORD_DIR, stage) as scratch:
            device = choose_devices(options.device, options.devices)[0]
            keep_finished(scratch, computed_on([device]), "calibrate", progress)
            statistics = _run(checkpoint, token_ids, device, scratch, times, progress)
        with times.phase(DISK):
            outputs = write_statistics(statistics, work_dir)
            outputs.append(_write_tokens(token_ids, options, work_dir))
        stage.record(outputs, times=times)
    progress.note(times.summary("calibrate"))
    return work_dir


def calibrate_stage(checkpoint_dir: Path, work_dir: Path, options: CalibrateOptions) -> Stage:
    """Return the record of a calibration: its inputs and what shapes its result."""
    file = Path(options.dataset)
    return Stage(
        name="calibrate",
        folder=work_dir,
        inputs=(checkpoint_dir, file) if file.is_file() else (checkpoint_dir,),
        settings={
            "dataset": "" if file.is_file() else options.dataset,
            "num_samples": options.num_samples,
            "seqlen": options.seqlen,
            "seed": options.seed,
        },
        version=VERSION,
    )


@dataclass(frozen=True)
class CalibrationTokens:
    """The windows that a model was calibrated on.

    Attributes:
        token_ids: ``[num_samples, seqlen]`` int32.
        dataset: name of the calibration set, or of the file.
        seed: with which the windows were drawn.
    """

    token_ids: torch.Tensor
    dataset: str
    seed: int


def read_calibration_tokens(work_dir: Path) -> CalibrationTokens:
    """Return the windows that ``calibrate`` left in ``work_dir``.

    Raises:
        PackageError: there are none, or they are damaged.
    """
    path = work_dir / CALIBRATION_TOKENS
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_FACTS])
            token_ids = file.get_tensor(TOKEN_IDS)
        found = CalibrationTokens(token_ids, str(facts["dataset"]), int(facts["seed"]))
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise PackageError(f"{path} cannot be read, run calibrate first") from error
    if token_ids.dtype != torch.int32 or token_ids.ndim != 2 or not token_ids.numel():
        raise PackageError(f"{path} holds no [num_samples, seqlen] int32, run calibrate again")
    return found


def _run(
    checkpoint: Checkpoint,
    token_ids: torch.Tensor,
    device: torch.device,
    scratch: Path,
    times: PhaseTimes,
    progress: Progress,
) -> Statistics:
    num_layers = checkpoint.model.num_hidden_layers
    with times.phase(READING, device):
        (activations,) = place_activations(checkpoint.model, token_ids, (device,), scratch)
        snapshots = Snapshots(scratch, [activations])
        start, notes = snapshots.load()
        if start == 0:
            activations.fill(checkpoint, token_ids)
    parts = _read_parts(notes) if start else []
    runner = LayerRunner(checkpoint, token_ids.shape[1], device)
    with (
        snapshots,
        tensor_cores(device),
        progress.task(f"calibrate on {device}", num_layers, "layers") as task,
    ):
        task.begin_at(start)
        for ready in ready_layers(checkpoint, range(start, num_layers), device, times):
            index = ready.index
            with times.phase(FORWARD, device):
                seen = LayerStatistics(checkpoint, index)
                runner.advance(ready.layer, activations, seen)
                parts.append(seen.statistics())
            del ready, seen  # else they are there until the next layer has come
            if snapshots.is_due():
                with times.phase(DISK):
                    snapshots.save(index + 1, _written_parts(parts))
            task.advance()
    with times.phase(FORWARD, device):
        last = _final_norm(checkpoint, activations, device)
    return merge([*parts, last])


def _written_parts(parts: list[Statistics]) -> bytes:
    stream = io.BytesIO()
    torch.save(parts, stream)
    return stream.getvalue()


def _read_parts(notes: bytes) -> list[Statistics]:
    parts: list[Statistics] = torch.load(io.BytesIO(notes), weights_only=True)
    return parts


def _final_norm(
    checkpoint: Checkpoint, activations: Activations, device: torch.device
) -> Statistics:
    seen = ChannelStatistics()
    weight = checkpoint.final_norm().to(device=device, dtype=torch.float32)
    for batch in activations.batches():
        states = activations.load(batch, device)
        seen.update(rms_norm(states, weight, checkpoint.model.rms_norm_eps))
    return final_norm_statistics(checkpoint, seen)


def _draw_windows(
    checkpoint: Checkpoint, options: CalibrateOptions, work_dir: Path, progress: Progress
) -> torch.Tensor:
    if options.seqlen > checkpoint.model.context_tokens:
        raise UsageError(
            f"calib-seqlen is {options.seqlen}, the model's context has "
            f"{checkpoint.model.context_tokens} tokens"
        )
    tokenizer = SourceTokenizer.open(checkpoint.path, checkpoint.model.vocab_size).tokenizer
    request = WindowRequest(options.dataset, options.num_samples, options.seqlen, options.seed)
    windows = calibration_windows(tokenizer, request, work_dir / RECORD_DIR / "datasets", progress)
    return torch.from_numpy(np.ascontiguousarray(windows))


def _write_tokens(token_ids: torch.Tensor, options: CalibrateOptions, work_dir: Path) -> Path:
    path = work_dir / CALIBRATION_TOKENS
    facts = json.dumps({"dataset": Path(options.dataset).name, "seed": options.seed})
    # The library writes several metadata keys in random order; one key keeps the bytes the same.
    metadata = {_FACTS: facts}
    write_atomically(path, save({TOKEN_IDS: token_ids.contiguous()}, metadata=metadata))
    return path
