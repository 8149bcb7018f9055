"""The `Backend` interface over CUDA: graphs for decode steps, passes for prompts, run ahead."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.base import Batch
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.footprint import BACKEND_NAME, DeviceFigures, package_survey
from device_runtime.backends.cuda.kernel_set import find_cubins, kernel_folders
from device_runtime.backends.cuda.runner import Runner
from device_runtime.backends.cuda.sizes import MAX_STEPS_AHEAD
from device_runtime.backends.cuda.state import Awaited
from device_runtime.backends.cuda.support import check_model, sources_for
from device_runtime.backends.cuda.survey import OpenDevice, free_bytes, open_device
from device_runtime.backends.kv_format import KvFormat
from device_runtime.backends.memory_plan import CacheRequest, MemoryPlan, MemorySurvey
from device_runtime.backends.reference.kv_cache import read_kv_scales
from device_runtime.errors import InternalError
from device_runtime.package_format.amounts import MIB
from device_runtime.package_format.package import Package


class CudaBackend:
    """Runs on one NVIDIA GPU; opens it when it is made."""

    name = BACKEND_NAME
    max_steps_ahead = MAX_STEPS_AHEAD

    def __init__(self) -> None:
        """Open the device.

        Raises:
            DeviceError: there is no CUDA driver or no device.
        """
        self._device: OpenDevice | None = open_device()
        self._runner: Runner | None = None
        self._pending: deque[list[Awaited]] = deque()

    @property
    def driver(self) -> CudaDriver:
        """The open device, for measurements."""
        return self._open().driver

    @property
    def runner(self) -> Runner:
        """What runs the loaded package, for measurements."""
        return self._loaded()

    def used_bytes(self) -> int:
        """Return what of the device is in use since it was opened, the context included."""
        device = self._open()
        return device.free_bytes + device.context_bytes - free_bytes(device.driver)

    def check(self, package: Package) -> None:
        """Refuse a package that this device cannot run.

        Raises:
            DeviceError: the model is not supported, or there are no kernels for the device.
        """
        check_model(package.model)
        folders = kernel_folders(package.kernels_dir)
        group_size = package.model.group_size
        find_cubins(folders, sources_for(package.model), group_size, self._open().driver)

    def survey(
        self, package: Package, request: CacheRequest, memory_limit_bytes: int | None
    ) -> MemorySurvey:
        """See `Backend.survey`."""
        self.check(package)
        if request.kv_format is KvFormat.INT8_STATIC:
            read_kv_scales(package)
        device = self._open()
        available = device.free_bytes + device.context_bytes
        notes: tuple[str, ...] = ()
        if memory_limit_bytes is not None and memory_limit_bytes > available:
            notes = (
                f"the memory limit of {memory_limit_bytes // MIB} MiB is more than the "
                f"{available // MIB} MiB that are available",
            )
        elif memory_limit_bytes is not None:
            available = memory_limit_bytes
        figures = DeviceFigures(
            num_sms=device.driver.attribute("multiprocessor_count"),
            is_integrated=bool(device.driver.attribute("integrated")),
            available_bytes=available,
            context_bytes=device.context_bytes,
        )
        return package_survey(package.model, request, figures, notes)

    def load(self, package: Package, plan: MemoryPlan) -> None:
        """See `Backend.load`."""
        driver = self._open().driver
        self._runner = Runner(driver, package, plan)

    def submit(self, batch: Batch) -> None:
        """See `Backend.submit`."""
        runner = self._loaded()
        try:
            self._pending.append(runner.submit(batch))
        except BaseException:
            self._fail()
            raise

    def collect(self) -> list[tuple[int, int]]:
        """See `Backend.collect`."""
        state = self._loaded().state
        try:
            return [
                (awaited.sequence_id, state.take_token(awaited))
                for awaited in self._pending.popleft()
            ]
        except BaseException:
            self._fail()
            raise

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """See `Backend.logits`."""
        return self._loaded().logits(batch)

    def forget(self, sequence_id: int) -> None:
        """See `Backend.forget`."""
        if self._runner is not None:
            self._runner.forget(sequence_id)

    def release(self, pages: list[int]) -> None:
        """Nothing to do: pages are overwritten in place."""

    def close(self) -> None:
        """See `Backend.close`."""
        runner, self._runner = self._runner, None
        device, self._device = self._device, None
        self._pending.clear()
        try:
            if runner is not None:
                runner.close()
        finally:
            if device is not None:
                device.driver.close()

    def _fail(self) -> None:
        """Leave nothing outstanding after a failure."""
        self._pending.clear()
        if self._runner is not None:
            self._runner.reset()

    def _open(self) -> OpenDevice:
        if self._device is None:
            raise InternalError("the cuda backend is closed")
        return self._device

    def _loaded(self) -> Runner:
        if self._runner is None:
            raise InternalError("the cuda backend has no package loaded")
        return self._runner
