"""Drawing the next token of one sequence: the meaning of `SamplingParams`, on numpy.

Every filter is a threshold on the logits, so equal logits stay or go together and a backend needs
no particular order of sorting.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.reference.philox import gumbel
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.errors import PackageError

MAX_GUMBEL_SPREAD = 19.5
"""No index this far below the best can win: the noise lies between -2.82 and 16.64."""


def sample(
    logits: NDArray[np.float32],
    params: SamplingParams,
    position: int,
    seen: NDArray[np.bool_] | None = None,
) -> int:
    """Return the token drawn for one sequence; the lowest index wins a tie.

    Args:
        logits: ``[vocab_size]`` fp32, left as they are.
        params: filters, temperature and seed.
        position: absolute index, in the sequence, of the token being drawn.
        seen: ``[vocab_size]`` bool, tokens the sequence holds; needed for a repetition penalty.

    Raises:
        PackageError: a logit is NaN or infinite.
    """
    if params.repetition_penalty != 1.0 and seen is not None:
        logits = penalize(logits, seen, params.repetition_penalty)
    best = int(np.argmax(logits))  # a NaN counts as the largest
    if not np.isfinite(logits[best]):
        raise PackageError(
            f"the logits at position {position} hold {logits[best]}, expected finite numbers; "
            "verify the package or convert it again"
        )
    if params.temperature == 0.0:
        return best
    # The best at 0 keeps tiny temperatures from overflowing and its weight at exp(0) = 1.
    scaled = (logits - logits[best]) / np.float32(params.temperature)
    candidates = survivors(scaled, params)
    scores = scaled[candidates] + gumbel(params.seed, position, candidates)
    return int(candidates[np.argmax(scores)])


def penalize(
    logits: NDArray[np.float32], seen: NDArray[np.bool_], penalty: float
) -> NDArray[np.float32]:
    """Return logits with those of seen tokens divided (above 0) or multiplied by the penalty.

    The rule is CTRL's (Keskar et al. 2019, section 4.1) as transformers and TurboMind apply it.
    """
    penalized: NDArray[np.float32] = logits.copy()
    indices = np.flatnonzero(seen)
    values = logits[indices]
    factor = np.float32(penalty)
    penalized[indices] = np.where(values > 0, values / factor, values * factor)
    return penalized


def survivors(scaled: NDArray[np.float32], params: SamplingParams) -> NDArray[np.int64]:
    """Return the indices that can still be drawn after top-k, top-p and min-p, ascending.

    Args:
        scaled: ``[vocab_size]`` fp32 logits over temperature, the largest at 0.
        params: top_k keeps the k largest; top_p the fewest of those, largest first, whose
            probabilities reach it; min_p those at least that share of the largest.
    """
    threshold = -MAX_GUMBEL_SPREAD
    if 0 < params.top_k < len(scaled):
        threshold = max(threshold, _kth_largest(scaled, params.top_k))
    if params.top_p < 1.0:
        # What lies below -19.5 weighs too little to be cut off from; it cannot be drawn anyway,
        # but its weight still counts.
        kept = scaled[scaled >= _kth_largest(scaled, params.top_k or len(scaled))]
        threshold = max(threshold, _nucleus_threshold(kept, params.top_p))
    if params.min_p > 0.0:
        threshold = max(threshold, math.log(params.min_p))
    return np.flatnonzero(scaled >= np.float32(threshold))


def _kth_largest(values: NDArray[np.float32], k: int) -> float:
    place = max(0, len(values) - k)
    return float(np.partition(values, place)[place])


def _nucleus_threshold(kept: NDArray[np.float32], top_p: float) -> float:
    """Return the smallest logit of the fewest largest ones whose probabilities reach top_p."""
    descending = np.sort(kept)[::-1]
    weights = np.cumsum(np.exp(descending, dtype=np.float64))
    place = int(np.searchsorted(weights, top_p * weights[-1]))
    return float(descending[min(place, len(descending) - 1)])
