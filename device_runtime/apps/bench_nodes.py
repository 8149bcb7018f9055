"""The nodes of a decode step and slices of the device, measured and told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from device_runtime.apps.bench_engine import OpenEngine
from device_runtime.apps.bench_runs import Workload
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import GenerationParams
from device_runtime.errors import UsageError

if TYPE_CHECKING:
    from device_runtime.backends.cuda.nodes import NodeTime
    from device_runtime.backends.cuda.slices import SliceRate


def node_times(opened: OpenEngine, workload: Workload) -> list[NodeTime]:
    """Let a workload's prompts run until all decode, then measure the step's nodes.

    Raises:
        UsageError: the backend has no nodes.
        DeviceError: the measurement failed.
    """
    from device_runtime.backends.cuda.backend import CudaBackend

    if not isinstance(opened.backend, CudaBackend):
        raise UsageError(f"--nodes measures the cuda backend, {opened.backend.name} runs")
    from device_runtime.backends.cuda.nodes import measure_nodes

    engine, backend = opened.engine, opened.backend
    rng = np.random.default_rng(0)
    params = GenerationParams(
        max_tokens=workload.completion_tokens,
        sampling=SamplingParams(temperature=0.0),
        ignore_eos=True,
    )
    shape = (workload.concurrency, workload.prompt_tokens)
    prompts = rng.integers(0, engine.vocab_size, shape).tolist()
    waiting = {engine.add(prompt, params) for prompt in prompts}
    try:
        while waiting:
            waiting -= {output.sequence_id for output in engine.step()}
        return measure_nodes(
            backend.driver,
            backend.runner,
            engine.package,
            workload.prompt_tokens,
            workload.concurrency,
        )
    finally:
        engine.close()


def node_lines(nodes: Sequence[NodeTime], workload: Workload) -> list[str]:
    """Return the nodes for a person."""
    if not nodes:
        return []
    title = f"nodes   of a step of {workload.concurrency} at {workload.prompt_tokens} tokens"
    lines = [f"{title}, in a graph of every layer's"]
    for node in nodes:
        line = f"  {node.name:<24}{1e6 * node.seconds:8.2f} us"
        if node.read_seconds:
            line += (
                f"{node.num_bytes / 1e6:9.2f} MB, reading them {1e6 * node.read_seconds:6.2f} us: "
                f"{node.ratio:.2f} times"
            )
        lines.append(line)
    return lines


def slice_lines(rates: Sequence[SliceRate]) -> list[str]:
    """Return the rates of slices for a person."""
    if not rates:
        return []
    lines = ["slices  4-bit weights per clock and SM, from L2"]
    for num_sms in dict.fromkeys(rate.num_sms for rate in rates):
        parts = [
            f"{rate.weights_per_clock:6.1f} with {rate.num_tokens} at once"
            for rate in rates
            if rate.num_sms == num_sms
        ]
        lines.append(f"  {num_sms:>2} SMs  {', '.join(parts)}")
    return lines
