"""Random weights made in GPU memory, for synthetic packages."""

from __future__ import annotations

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.weights import WeightLayout
from device_runtime.backends.synthetic import SyntheticPackage
from device_runtime.kernels.libcuda import Stream


def fill_weights(
    driver: CudaDriver,
    stream: Stream,
    package: SyntheticPackage,
    layout: WeightLayout,
    places: dict[str, int],
) -> None:
    """Put a block of random elements at the start of each tensor and repeat it over the rest."""
    for piece in layout.pieces:
        base, size = places[piece.tensor], layout.sizes[piece.tensor]
        block = package.random_block(piece.spec)
        done = min(block.nbytes, size)
        driver.copy_to_device(base, block.ctypes.data, done)
        driver.synchronize()  # a copy from pageable memory may still be on its way
        while done < size:
            count = min(done, size - done)
            driver.copy_on_device(base + done, base, count, stream)
            done += count
    stream.synchronize()
