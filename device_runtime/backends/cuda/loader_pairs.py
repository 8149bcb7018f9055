"""Gate and up matrices, woven into one in fp16 while they are copied: gate, up, gate, up, ..."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.cuda.bf16_weights import to_half
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.loader import drop_from_page_cache
from device_runtime.backends.cuda.sizes import STAGING_BYTES
from device_runtime.backends.cuda.staging import Staging
from device_runtime.backends.cuda.weights import GatePair
from device_runtime.kernels.libcuda import Stream
from device_runtime.package_format.package import Package
from device_runtime.package_format.tensors import BF16_BITS, TensorSpec


def load_pairs(
    driver: CudaDriver,
    stream: Stream,
    package: Package,
    pairs: tuple[GatePair, ...],
    places: dict[str, int],
) -> None:
    """Weave and copy through two pinned buffers; returns when everything is there.

    Raises:
        PackageError: a file is missing or was changed.
        DeviceError: a copy failed, or a bf16 value is too large for fp16.
    """
    if not pairs:
        return
    with Staging(driver, stream, STAGING_BYTES) as staging:
        for pair in pairs:
            gate, up = package.tensor(pair.gate.name), package.tensor(pair.up.name)
            step = max(1, STAGING_BYTES // pair.row_bytes)
            for first in range(0, len(gate), step):
                buffer = staging.take()
                num_rows = min(step, len(gate) - first)
                view = buffer.memory.bytes[: num_rows * pair.row_bytes].view(np.float16)
                woven = view.reshape(num_rows, -1, 2)
                woven[:, :, 0] = _as_half(gate[first : first + num_rows], pair.gate)
                woven[:, :, 1] = _as_half(up[first : first + num_rows], pair.up)
                driver.copy_rows(
                    places[pair.tensor] + pair.offset + first * pair.pitch,
                    pair.pitch,
                    buffer.memory.address,
                    row_bytes=pair.row_bytes,
                    num_rows=num_rows,
                    stream=stream,
                )
                staging.sent(buffer)
            del gate, up
            for spec in (pair.gate, pair.up):
                drop_from_page_cache(package.root / spec.path)


def _as_half(
    rows: NDArray[np.float16] | NDArray[np.uint16], spec: TensorSpec
) -> NDArray[np.float16]:
    if spec.dtype == BF16_BITS:
        return to_half(rows.view(np.uint16), spec.name)
    return rows.view(np.float16)
