"""The interface between the engine, which plans steps, and a backend, which runs them.

Steps run in the order in which they are submitted. So a page may go to another sequence while a
step that writes to it is still outstanding: what the later step writes there comes later.

Attention reads every key and value back from the cache, those of the same step included, as
TurboMind's prefill does (spec section 4.4). So neither chunking, nor a cached prefix, nor
preemption changes a result by more than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.memory_plan import CacheRequest, MemoryPlan, MemorySurvey
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.package_format.package import Package


@dataclass(frozen=True)
class Batch:
    """One step: new tokens of several sequences, packed without padding.

    What there is one of for each token is an array; the rest, one for each sequence, is Python's
    own, which a decode step makes and reads faster than small arrays.

    Sequence i owns tokens ``query_start[i]:query_start[i + 1]``. A decode row has one token; when
    ``is_chained[i]`` the backend takes that token from the sequence's newest sampled token, which
    the host may not have seen yet, and ``token_ids`` holds 0 there.

    Attributes:
        sequence_ids: one per sequence; a backend keys its sampling state by it.
        token_ids: ``[num_tokens]`` int32.
        positions: ``[num_tokens]`` int32, absolute.
        query_start: num_sequences + 1 of them, first 0, last num_tokens.
        num_cached: tokens of each sequence already in its pages.
        pages: of each sequence, in order; enough for its tokens after the step.
        rope_theta: the rotary base of each sequence; they differ only under dynamic NTK scaling
            (spec section 3).
        sampling: how to draw the next token of each sequence. Its noise is that of the absolute
            position which the drawn token will have, one more than the last of the row.
        is_sampled: for each sequence; false for a prompt chunk that is not the last.
        is_chained: for each sequence.
        history: for a sequence that is new to the backend all of its token ids up to the end of
            this step's chunk (the repetition penalty counts them), else empty; each int32. A
            backend adds the rows' tokens of the sequences it knows, and what it draws, itself.
    """

    sequence_ids: tuple[int, ...]
    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    query_start: tuple[int, ...]
    num_cached: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    rope_theta: tuple[float, ...]
    sampling: tuple[SamplingParams, ...]
    is_sampled: tuple[bool, ...]
    is_chained: tuple[bool, ...]
    history: tuple[NDArray[np.int32], ...]

    @property
    def num_sequences(self) -> int:
        """Sequences in this step."""
        return len(self.sequence_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens in this step, all sequences together."""
        return int(self.token_ids.shape[0])


class Backend(Protocol):
    """Runs planned steps. Not thread-safe: one engine drives it.

    A call that raises leaves no step outstanding.
    """

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def max_steps_ahead(self) -> int:
        """Most steps outstanding beside the one collected next (reference: 0); see `RunAhead`."""

    def survey(
        self, package: Package, request: CacheRequest, memory_limit_bytes: int | None
    ) -> MemorySurvey:
        """Look at the device and say what it has and what the package takes there.

        Allocates nothing of size. ``memory_limit_bytes`` stands for a smaller device.

        Raises:
            DeviceError: there is no such device, or it cannot run the package.
            PackageError: the package lacks what the request needs.
        """

    def load(self, package: Package, plan: MemoryPlan) -> None:
        """Put weights in place and allocate the KV pages of the plan."""

    def submit(self, batch: Batch) -> None:
        """Enqueue one step and return at once."""

    def collect(self) -> list[tuple[int, int]]:
        """Return (sequence_id, token_id) of the oldest outstanding step, once it is finished.

        One pair for every row with ``is_sampled``, in the batch's order.
        """

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """Run one step and return ``[num_tokens, vocab_size]``; samples nothing.

        Called with no step outstanding.
        """

    def forget(self, sequence_id: int) -> None:
        """Drop the sampling state of a sequence none of whose steps is outstanding."""

    def release(self, pages: list[int]) -> None:
        """Hear that pages went back to the pool; their content may be overwritten."""

    def close(self) -> None:
        """Free everything; a second call does nothing."""
