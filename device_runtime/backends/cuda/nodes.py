"""What each node of a decode step takes inside a graph, beside nodes that only read as many bytes.

A graph holds the same node of every layer in a row, so that each reads other weights and a layer's
weights have left the L2 cache when their turn comes again.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.kernel_set import KernelSet, find_cubins, kernel_folders
from device_runtime.backends.cuda.linears import Matrix
from device_runtime.backends.cuda.runner import Runner
from device_runtime.kernels.graphs import Capture, Launch
from device_runtime.kernels.libcuda import Event, Stream
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import Package

_ROUNDS = 9
_BLOCKS_PER_SM = (1, 2, 4)
_MATRIX_NAMES = ("qkv", "wo", "gate+up", "down")
_CHUNK_BYTES = 16


@dataclass(frozen=True)
class NodeTime:
    """One node, or all nodes of a layer.

    Attributes:
        name: of the matrix, "attention" or "layer"; other nodes have that of their kernel.
        kernel: entry point, "" for the layer.
        num_bytes: of weights or keys and values that it reads.
        seconds: in a graph of it alone; the layer's in a graph of whole layers.
        read_seconds: of nodes that only read as many bytes; 0 where it reads next to nothing.
    """

    name: str
    kernel: str
    num_bytes: int
    seconds: float
    read_seconds: float

    @property
    def ratio(self) -> float:
        """How much longer than reading it takes; 0 where it reads next to nothing."""
        return self.seconds / self.read_seconds if self.read_seconds else 0.0


@dataclass(frozen=True)
class _Source:
    """Where a node reads: (address, bytes) in each layer; no ranges where they are not whole."""

    name: str
    ranges: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.ranges) // max(1, len(self.ranges))


def matrix_bytes(matrix: Matrix, group_size: int) -> int:
    """Return the bytes of a matrix: 4-bit codes with a word for each group, or fp16."""
    count = matrix.num_inputs * matrix.num_outputs
    if not matrix.is_quantized:
        return 2 * count
    return count // 2 + 4 * count // group_size


def measure_nodes(
    driver: CudaDriver, runner: Runner, package: Package, length: int, width: int = 1
) -> list[NodeTime]:
    """Measure the nodes of a decode step; what runs must be at ``length`` tokens each.

    The state of the sequences is spoilt: end them afterwards.

    Args:
        driver: open.
        runner: with ``width`` sequences decoding.
        package: that it runs.
        length: tokens of each sequence.
        width: sequences at once.

    Raises:
        DeviceError: there are no kernels for the device.
    """
    model, programs, stream = package.model, runner.programs, runner.memory.stream
    layers = range(model.num_hidden_layers)
    launches = [programs.decode_layer(layer, width) for layer in layers]
    sources = _sources(model, runner, length, width)
    files = find_cubins(kernel_folders(package.kernels_dir), ("read_bandwidth",), 0, driver)
    with ExitStack() as stack:
        kernels = stack.enter_context(closing(KernelSet(driver, files)))
        sink = driver.allocate(4)
        stack.callback(driver.free, sink)
        times = []
        layer_bytes, layer_reads = 0, 0.0
        waiting = list(sources)
        for place, launch in enumerate(launches[0]):
            seconds = _time(driver, stream, [nodes[place] for nodes in launches]) / len(layers)
            source = _take(waiting, launch.name)
            if source is None:
                times.append(NodeTime(launch.name, launch.name, 0, seconds, 0.0))
                continue
            reads = _best_read(driver, stream, kernels, sink, source) / len(layers)
            layer_bytes, layer_reads = layer_bytes + source.num_bytes, layer_reads + reads
            times.append(NodeTime(source.name, launch.name, source.num_bytes, seconds, reads))
        chain = [launch for nodes in launches for launch in nodes]
        seconds = _time(driver, stream, chain) / len(layers)
        return [*times, NodeTime("layer", "", layer_bytes, seconds, layer_reads)]


def _sources(model: ModelConfig, runner: Runner, length: int, width: int) -> list[_Source]:
    limits, programs = runner.memory.limits, runner.programs
    layers = [programs.layer_weights(layer) for layer in range(model.num_hidden_layers)]
    sources = []
    for place, name in enumerate(_MATRIX_NAMES):
        matrices = [matrices[place] for matrices in layers]
        ranges = tuple((m.parts[0], matrix_bytes(m, model.group_size)) for m in matrices)
        # Codes and the words of their groups are neighbours, unless memory came in chunks.
        is_whole = all(
            address <= part < address + size
            for matrix, (address, size) in zip(matrices, ranges, strict=True)
            for part in matrix.parts
        )
        sources.append(_Source(name, ranges if is_whole else ()))
    kv_bytes = limits.kv_region_bytes(1) * length // limits.layout.page_size * width
    kv = _Source("attention", tuple((address, kv_bytes) for address in runner.memory.kv))
    return [sources[0], kv, *sources[1:]]


def _take(waiting: list[_Source], kernel: str) -> _Source | None:
    """Return what a kernel reads, the next in line, or None for one that reads no weights."""
    is_reader = "attention" in kernel or "_gemv_" in kernel or "_gemm_" in kernel
    return waiting.pop(0) if is_reader and waiting else None


def _best_read(
    driver: CudaDriver, stream: Stream, kernels: KernelSet, sink: int, source: _Source
) -> float:
    """Return the seconds of all layers' reads with the number of blocks that is fastest."""
    if not source.ranges:
        return 0.0
    best = float("inf")
    for blocks in _BLOCKS_PER_SM:
        grid = (blocks * kernels.num_sms, 1, 1)
        nodes = [
            kernels.launch("read_bandwidth", grid, (sink, address, size // _CHUNK_BYTES))
            for address, size in source.ranges
        ]
        best = min(best, _time(driver, stream, nodes))
    return best


def _time(driver: CudaDriver, stream: Stream, nodes: Sequence[Launch]) -> float:
    """Return the seconds of a graph of these nodes, the median of several."""
    with Capture(driver, stream) as capture:
        for node in nodes:
            node.enqueue(stream)
    times = []
    with (
        closing(capture.graph) as graph,
        closing(Event(driver)) as start,
        closing(Event(driver)) as end,
    ):
        graph.upload(stream)
        for _ in range(_ROUNDS + 2):
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(end.seconds_since(start))
    return statistics.median(times[2:])
