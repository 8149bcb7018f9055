"""What a board would do: arithmetic over its facts, labelled as such, never a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from device_runtime.apps.bench_runs import Workload
from device_runtime.backends.base import Backend
from device_runtime.backends.memory_plan import CacheRequest
from device_runtime.engine.board_plan import fitting_tokens, single_session
from device_runtime.package_format.boards import Board
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import Package
from device_runtime.package_format.tensors import linear_shapes

if TYPE_CHECKING:
    from device_runtime.backends.cuda.slices import SliceRate

BANDWIDTH_SHARE = {87: 0.80, 110: 0.90, 72: 0.75}
"""Of the nominal bandwidth that engines reach: AGX Orin 163-166 of 204.8 GB/s, Thor 242-245 of 273
(jetson facts B.0); Xavier is a guess."""
NODE_GAP_S = {87: 2.0e-6, 110: 1.5e-6, 72: 3.0e-6}
"""From one kernel of a graph to the next (kernel study section 5.3: 1.5 to 3 us on Orin)."""
ASSUMED_WEIGHTS_PER_CLOCK = 45.0
"""4-bit weights per clock and SM where nothing was measured."""
NODES_PER_LAYER = 5
NODES_BESIDE_LAYERS = 3


@dataclass(frozen=True)
class Projection:
    """Decoding one sequence on a board, computed.

    Attributes:
        board: its name.
        bytes_per_step: of weights and KV cache.
        memory_s: to read them at the assumed share of the bandwidth.
        arithmetic_s: to multiply the 4-bit weights at the rate per clock and SM.
        launch_s: of the gaps between the nodes of the graph.
        decode_tok_s: of the larger of the first two plus the third.
        weights_per_clock: the rate used.
        is_rate_measured: on a slice of this machine's GPU, with its SM.
        bandwidth_share: of the nominal bandwidth.
        num_nodes: of a step's graph.
        session_tokens: of the longest conversation that fits there, 0 where the model does not.
    """

    board: str
    bytes_per_step: int
    memory_s: float
    arithmetic_s: float
    launch_s: float
    decode_tok_s: float
    weights_per_clock: float
    is_rate_measured: bool
    bandwidth_share: float
    num_nodes: int
    session_tokens: int


def quantized_weights(model: ModelConfig) -> int:
    """Return the number of 4-bit weights that a decode step multiplies."""
    shapes = (
        shape
        for layer in range(model.num_hidden_layers)
        for shape in linear_shapes(model, layer)
        if shape.is_quantized
    )
    one_rank = sum(shape.num_inputs * shape.num_outputs for shape in shapes)
    return model.tensor_para_size * one_rank


def project(
    board: Board,
    model: ModelConfig,
    request: CacheRequest,
    bytes_per_step: int,
    weights_per_clock: float | None,
) -> Projection:
    """Return what a board would do.

    Args:
        board: facts.
        model: what runs.
        request: with its KV cache.
        bytes_per_step: read by one decode step of one sequence.
        weights_per_clock: measured on a slice, or None to assume.
    """
    rate = weights_per_clock or ASSUMED_WEIGHTS_PER_CLOCK
    share = BANDWIDTH_SHARE[board.sm]
    memory_s = bytes_per_step / (share * board.bandwidth_gb_s * 1e9)
    arithmetic_s = quantized_weights(model) / (rate * board.num_sms * board.gpu_mhz * 1e6)
    num_nodes = NODES_PER_LAYER * model.num_hidden_layers + NODES_BESIDE_LAYERS
    launch_s = num_nodes * NODE_GAP_S[board.sm]
    return Projection(
        board=board.name,
        bytes_per_step=bytes_per_step,
        memory_s=memory_s,
        arithmetic_s=arithmetic_s,
        launch_s=launch_s,
        decode_tok_s=1 / (max(memory_s, arithmetic_s) + launch_s),
        weights_per_clock=rate,
        is_rate_measured=weights_per_clock is not None,
        bandwidth_share=share,
        num_nodes=num_nodes,
        session_tokens=fitting_tokens(model, single_session(model, request), board),
    )


def slice_rates(backend: Backend, package: Package) -> list[SliceRate]:
    """Return the GEMV's rates on slices of the device; empty without a GPU.

    Raises:
        DeviceError: the measurement failed.
    """
    from device_runtime.backends.cuda.backend import CudaBackend

    if not isinstance(backend, CudaBackend) or not package.model.group_size:
        return []
    from device_runtime.backends.cuda.slices import measure_slices

    return measure_slices(backend.driver, package)


def rates_alone(rates: Sequence[SliceRate]) -> dict[int, float]:
    """Return weights per clock and SM for one token by SMs of the slice."""
    return {rate.num_sms: rate.weights_per_clock for rate in rates if rate.num_tokens == 1}


def nearest_rate(rates: dict[int, float], num_sms: int) -> float | None:
    """Return the rate of the slice closest to a board's number of SMs."""
    if not rates:
        return None
    return rates[min(rates, key=lambda slice_sms: abs(slice_sms - num_sms))]


def project_all(
    boards: tuple[Board, ...],
    model: ModelConfig,
    request: CacheRequest,
    bytes_per_step: int,
    rates: dict[int, float],
) -> list[Projection]:
    """Return the projection of each board."""
    return [
        project(board, model, request, bytes_per_step, nearest_rate(rates, board.num_sms))
        for board in boards
    ]


def projection_lines(projections: Sequence[Projection], workload: Workload) -> list[str]:
    """Return projections and their assumptions for a person."""
    if not projections:
        return []
    length = workload.prompt_tokens + workload.completion_tokens // 2
    lines = [f"projected, not measured: one sequence of {length} tokens"]
    for p in projections:
        source = "measured on a slice of this GPU" if p.is_rate_measured else "assumed"
        lines += [
            f"  {p.board}: {p.decode_tok_s:.1f} tok/s = 1 / (max(memory {1e3 * p.memory_s:.1f} ms, "
            f"arithmetic {1e3 * p.arithmetic_s:.1f} ms) + launches {1e3 * p.launch_s:.2f} ms)",
            f"    {p.bytes_per_step / 1e9:.2f} GB at {p.bandwidth_share:.0%} of the nominal "
            f"bandwidth; {p.weights_per_clock:.0f} weights per clock and SM, {source}; "
            f"{p.num_nodes} nodes",
        ]
        if p.session_tokens < length:
            lines.append(
                f"    but its memory holds {p.session_tokens} tokens beside the weights: "
                f"turbojet info MODEL --board {p.board}"
            )
    return lines
