"""How a row's token is drawn, as the sampling kernels read it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

STOP_IDS = 8
"""Token ids that end a row on the device (sampling.cuh kStopIds)."""

DRAW_SHARED_BYTES = 51496
"""Dynamic shared memory of sample_draw.cu (its struct Shared)."""

LOWEST_DRAWN = -19.5
"""Nothing further below the largest scaled logit can win: see backends/reference/sampler.py."""

SAMPLING_ROW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("floor", np.float32),
        ("penalty", np.float32),
        ("seed_low", np.uint32),
        ("seed_high", np.uint32),
        ("unused", np.int32),
    ]
)
"""One record of struct SamplingRow (sampling.cuh)."""


def sampling_row(
    *, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int
) -> NDArray[np.void]:
    """Return the record of one row, ``[1]`` of `SAMPLING_ROW`."""
    floor = max(LOWEST_DRAWN, math.log(min_p)) if min_p > 0 else LOWEST_DRAWN
    record = np.zeros(1, SAMPLING_ROW)
    low, high = seed & 0xFFFFFFFF, seed >> 32
    record[0] = (temperature, top_k, top_p, floor, penalty, low, high, 0)
    return record
