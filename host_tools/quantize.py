"""Makes 4-bit weights of a calibrated checkpoint: an AWQ folder that the common engines load."""

from __future__ import annotations

import shutil
from pathlib import Path

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.manifest import Calibration
from device_runtime.package_format.model_config import ModelConfig
from host_tools.awq.awq_folder import write_awq_folder
from host_tools.awq.channel_scales import ValueRange
from host_tools.awq.fused_blocks import is_fused
from host_tools.calibrate import CALIBRATION_TOKENS, CalibrationTokens, read_calibration_tokens
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint.mixed import kept_linears
from host_tools.decoder.devices import choose_devices
from host_tools.kv_qparams import VALUE_STATS, read_extrema
from host_tools.layer_records import write_quantize_record
from host_tools.options import GROUP_SIZES, QuantizeOptions
from host_tools.origin import read_origin, write_origin
from host_tools.output_folder import (
    behind_link,
    check_outside,
    check_replaceable,
    replace_folder,
    scratch_folder,
)
from host_tools.phase_times import DISK, HASHING, PhaseTimes
from host_tools.progress import Progress
from host_tools.quantize_layers import LayerQuantizer
from host_tools.stage import RECORD_DIR, Stage, exclusive
from host_tools.unfinished import computed_on, keep_finished

VERSION = 5
"""Counted up when the same inputs start to give other codes."""


def quantize(
    checkpoint_dir: Path,
    work_dir: Path,
    output_dir: Path,
    options: QuantizeOptions,
    progress: Progress,
) -> Path:
    """Quantize the linears of every decoder layer on the windows that ``calibrate`` drew.

    The layers are streamed once, tap by tap: what the original's activations and those of the
    quantized model so far bring to a linear is summed up in second moments; these give scales and
    codes, and are gone before the next. Several devices search strips of a linear's outputs at the
    same time. A killed run goes on with the layers that it had not finished and ends with the same
    bytes; on another kind of processor it begins again. Where the time went is noted in the stage's
    record and told at the end.

    Args:
        checkpoint_dir: a checkpoint in floating point.
        work_dir: of ``calibrate``; holds what is finished so far. Plain rounding needs no
            calibration.
        output_dir: the AWQ folder; one of an earlier run is replaced when this one is whole.
        options: group size, method and device.
        progress: hears of every layer.

    Returns:
        ``output_dir``.

    Raises:
        UsageError: the group size does not divide the model's inputs, a pattern of linears that
            stay fp16 matches none, or ``output_dir`` holds something else.
        PackageError: the checkpoint is damaged or quantized already, or not calibrated.
        DeviceError: the device is not there.
    """
    output_dir = behind_link(output_dir)
    check_outside(checkpoint_dir, work_dir, output_dir)
    times = PhaseTimes()
    stage = quantize_stage(checkpoint_dir, work_dir, output_dir, options)
    with exclusive(work_dir):
        with times.phase(HASHING):
            is_finished = stage.is_finished()
        if is_finished:
            progress.note(f"quantize: {output_dir} is up to date")
            return output_dir
        check_replaceable(output_dir, stage)
        checkpoint = Checkpoint.open(checkpoint_dir)
        check_quantizable(checkpoint, options.group_size)
        kept = kept_linears(options.keep_fp16, checkpoint.model.num_hidden_layers)
        for note in kept.notes:
            progress.note(note)
        tokens = None if options.method == "rtn" else read_calibration_tokens(work_dir)
        with scratch_folder(work_dir / RECORD_DIR, stage) as scratch:
            devices = choose_devices(options.device, options.devices)
            place = computed_on(devices)
            if tokens is not None and any(is_fused(device) for device in devices):
                place += ", searched by Triton kernels"
            keep_finished(scratch, place, "quantize", progress)
            values = () if tokens is None else _value_ranges(work_dir, checkpoint)
            quantizer = LayerQuantizer(checkpoint, scratch, options, kept, devices, times, values)
            if tokens is None:
                quantizer.round(progress)
            else:
                quantizer.solve(tokens.token_ids, progress)
            part = output_dir.with_name(f".{output_dir.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            with times.phase(DISK):
                write_awq_folder(part, checkpoint, quantizer.files, options.group_size)
            _write_origin(checkpoint_dir, part, tokens)
            stage.record([part], part, times)
            write_quantize_record(work_dir, quantizer.record(stage.fingerprint, place))
            replace_folder(part, output_dir)
    progress.note(times.summary("quantize"))
    return output_dir


def quantize_stage(
    checkpoint_dir: Path, work_dir: Path, output_dir: Path, options: QuantizeOptions
) -> Stage:
    """Return the record of a quantization: its inputs and what shapes its result.

    Raises:
        PackageError: there is no calibration and the method needs one.
    """
    tokens = work_dir / CALIBRATION_TOKENS
    if options.method != "rtn" and not tokens.is_file():
        raise PackageError(f"{work_dir} holds no calibration, run calibrate first")
    seen = [] if options.method == "rtn" else [tokens]
    if seen and (work_dir / VALUE_STATS).is_file():
        seen.append(work_dir / VALUE_STATS)
    return Stage(
        name="quantize",
        folder=output_dir,
        inputs=(checkpoint_dir, *seen),
        settings={
            "w_bits": options.w_bits,
            "group_size": options.group_size,
            "method": options.method,
            "keep_fp16": tuple(sorted(set(options.keep_fp16))),
        },
        version=VERSION,
    )


def valid_group_sizes(model: ModelConfig) -> tuple[int, ...]:
    """Return the group sizes that divide the inputs of every linear, largest first."""
    inputs = (model.hidden_size, model.q_size, model.intermediate_size)
    return tuple(size for size in GROUP_SIZES if not any(count % size for count in inputs))


def check_quantizable(checkpoint: Checkpoint, group_size: int) -> None:
    """Refuse what cannot be quantized so.

    Raises:
        PackageError: the checkpoint is quantized already.
        UsageError: the group size does not divide the inputs of a linear.
    """
    model = checkpoint.model
    if checkpoint.is_quantized:
        raise PackageError(
            f"{checkpoint.path} is quantized already, quantize its floating-point original"
        )
    valid = valid_group_sizes(model)
    if group_size not in valid:
        sizes = f"{model.hidden_size}, {model.q_size} and {model.intermediate_size}"
        advice = f"use {' or '.join(map(str, valid))}" if valid else "no group size does"
        raise UsageError(
            f"w-group-size {group_size} does not divide all inputs of the linears ({sizes}), "
            f"{advice}"
        )


def _value_ranges(work_dir: Path, checkpoint: Checkpoint) -> tuple[ValueRange, ...]:
    """Return what calibrate saw of each layer's values."""
    if not (work_dir / VALUE_STATS).is_file():
        return ()
    return tuple(
        ValueRange(*(extreme.float().flatten() for extreme in extrema))
        for extrema in read_extrema(work_dir / VALUE_STATS, checkpoint.model)
    )


def _write_origin(checkpoint_dir: Path, folder: Path, tokens: CalibrationTokens | None) -> None:
    calibration = None
    if tokens is not None:
        num_samples, seqlen = tokens.token_ids.shape
        calibration = Calibration(tokens.dataset, num_samples, seqlen, tokens.seed)
    origin = read_origin(checkpoint_dir, is_quantized=False)
    write_origin(folder, origin.quantized("rtn" if tokens is None else "awq", calibration))
