"""Says how long a calibration on the CPU will take, before it takes it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from device_runtime.package_format.amounts import format_duration
from device_runtime.package_format.model_config import ModelConfig
from host_tools.calibrate import calibrate_stage
from host_tools.checkpoint import Checkpoint
from host_tools.decoder.stream import choose_device
from host_tools.options import CalibrateOptions

PROBE_S = 0.2
PROBE_TOKENS = 512
OVERHEAD = 2.0
"""Attention, statistics and reading weights, on top of the linears; 1.6 to 2.3 were measured."""

QUICK = replace(CalibrateOptions(), num_samples=16, seqlen=512)
"""A calibration that a CPU does in a short time; it costs little quality on small models."""


def cpu_notice(checkpoint_dir: Path, work_dir: Path, options: CalibrateOptions) -> str | None:
    """Return what to tell a person before a calibration on the CPU, None where nothing is to tell.

    Args:
        checkpoint_dir: the checkpoint.
        work_dir: of the calibration; a finished one takes no time.
        options: the calibration.

    Raises:
        PackageError: the checkpoint is damaged.
        DeviceError: the device is not there.
    """
    if choose_device(options.device).type != "cpu":
        return None
    if calibrate_stage(checkpoint_dir, work_dir, options).is_finished():
        return None
    model = Checkpoint.open(checkpoint_dir).model
    flops_per_s = probe_flops_per_s(model)

    def describe(calibration: CalibrateOptions) -> str:
        return format_duration(estimate_s(model, calibration, flops_per_s))

    notice = (
        f"calibrate: {options.num_samples} x {options.seqlen} tokens of {options.dataset} on the "
        f"CPU take about {describe(options)}"
    )
    if options.num_samples * options.seqlen > QUICK.num_samples * QUICK.seqlen:
        notice += (
            f"; --calib-samples {QUICK.num_samples} --calib-seqlen {QUICK.seqlen} would take "
            f"{describe(QUICK)}"
        )
    return notice


def estimate_s(model: ModelConfig, options: CalibrateOptions, flops_per_s: float) -> float:
    """Return the seconds that the decoder layers take over the calibration set.

    Two operations for each weight and token, and ``OVERHEAD``.
    """
    per_layer = model.hidden_size * (model.qkv_size + model.q_size + 3 * model.intermediate_size)
    weights = model.num_hidden_layers * per_layer
    return 2.0 * weights * options.num_samples * options.seqlen * OVERHEAD / flops_per_s


def probe_flops_per_s(model: ModelConfig) -> float:
    """Measure fp32 operations per second on a product of the model's own shape."""
    inputs = torch.randn(PROBE_TOKENS, model.hidden_size)
    weight = torch.randn(model.intermediate_size, model.hidden_size)
    torch.nn.functional.linear(inputs, weight)
    rounds, started_s = 0, time.monotonic()
    while time.monotonic() - started_s < PROBE_S:
        torch.nn.functional.linear(inputs, weight)
        rounds += 1
    return 2.0 * inputs.numel() * model.intermediate_size * rounds / (time.monotonic() - started_s)
