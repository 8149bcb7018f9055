"""From a package and a plan to memory on the device, in the order in which it is undone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from device_runtime.backends.cuda.arena import allocate_arena
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.fill import fill_weights
from device_runtime.backends.cuda.kernel_set import KernelSet, find_cubins, kernel_folders
from device_runtime.backends.cuda.loader import load_weights
from device_runtime.backends.cuda.loader_pairs import load_pairs
from device_runtime.backends.cuda.programs import Memory, Programs
from device_runtime.backends.cuda.sizes import step_limits
from device_runtime.backends.cuda.support import check_model, sources_for
from device_runtime.backends.cuda.weights import static_kv_parameters, weight_layout
from device_runtime.backends.cuda.workspace import SHARED, StepLimits
from device_runtime.backends.memory_plan import MemoryPlan
from device_runtime.backends.reference.kv_cache import read_kv_scales
from device_runtime.backends.synthetic import SyntheticPackage
from device_runtime.kernels.libcuda import Stream
from device_runtime.package_format.package import Package


@dataclass(frozen=True)
class LoadedMemory:
    """What `load_memory` made.

    Attributes:
        stream: of every launch and copy.
        limits: of a step.
        kernels: loaded.
        weights: address of each joined tensor.
        buffers: address of each buffer, all zero but what `StepLimits.buffers` says.
        kv: address of each layer's pages.
    """

    stream: Stream
    limits: StepLimits
    kernels: KernelSet
    weights: dict[str, int]
    buffers: dict[str, int]
    kv: tuple[int, ...]

    def programs(self, ring_address: int) -> Programs:
        """Return the launches over this memory."""
        memory = Memory(self.weights, self.buffers, self.kv, ring_address)
        return Programs(self.kernels, self.limits, memory)


def load_memory(
    driver: CudaDriver, package: Package, plan: MemoryPlan, exits: ExitStack
) -> LoadedMemory:
    """Load kernels and weights, allocate pages and buffers.

    Args:
        driver: open.
        package: to load.
        plan: of the same package.
        exits: takes what frees each thing, also when a later one fails.

    Raises:
        OutOfMemoryError: the plan does not fit after all.
        DeviceError: the device cannot run the package.
        PackageError: a file cannot be read.
    """
    model = package.model
    check_model(model)
    files = find_cubins(
        kernel_folders(package.kernels_dir), sources_for(model), model.group_size, driver
    )
    stream = driver.new_stream()
    exits.callback(stream.close)
    kernels = KernelSet(driver, files)
    exits.callback(kernels.close)
    limits = step_limits(model, plan, kernels.num_sms)
    layout = weight_layout(model)

    weights = allocate_arena(driver, layout.region_sizes, "weights")
    exits.callback(weights.free)
    page_sizes = [limits.kv_region_bytes(plan.num_pages)] * model.num_hidden_layers
    kv = allocate_arena(driver, page_sizes, "KV pages")
    exits.callback(kv.free)
    sizes = limits.buffers()
    workspace = allocate_arena(driver, list(sizes.values()), "workspace")
    exits.callback(workspace.free)

    buffers = dict(zip(sizes, workspace.addresses, strict=True))
    for name, address in buffers.items():
        driver.fill(address, 0, -(-sizes[name] // 4), stream)
    buffers |= {name: buffers[other] for name, other in SHARED.items()}
    places = layout.places(weights.addresses)
    if isinstance(package, SyntheticPackage):
        fill_weights(driver, stream, package, layout, places)
    else:
        load_weights(driver, stream, package.root, layout.pieces, places)
        load_pairs(driver, stream, package, layout.pairs, places)
    if "kv_scales" in buffers:
        _put_kv_scales(driver, package, buffers["kv_scales"])
    if "no_rotation" in buffers:
        turns = np.tile(np.array([1, 0], np.float32), sizes["no_rotation"] // 8)
        driver.copy_to_device(buffers["no_rotation"], turns.ctypes.data, turns.nbytes)
    driver.synchronize()  # copies from pageable memory, for which the stream does not wait
    return LoadedMemory(stream, limits, kernels, places, buffers, kv.addresses)


def _put_kv_scales(driver: CudaDriver, package: Package, address: int) -> None:
    for layer, ranks in enumerate(read_kv_scales(package)):
        numbers = tuple(
            (scale.k_scale, scale.k_zero_point, scale.v_scale, scale.v_zero_point)
            for scale in ranks
        )
        rows = static_kv_parameters(numbers, package.model.num_kv_heads)
        driver.copy_to_device(address + layer * rows.nbytes, rows.ctypes.data, rows.nbytes)
