"""The step state in device memory: uploads what a plan changes, reads what the sampler chose."""

from __future__ import annotations

import time
from ctypes import c_size_t, c_uint, c_ulonglong
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from device_runtime.backends.cuda.driver import CudaDriver, PinnedMemory
from device_runtime.backends.cuda.slots import IDLE, Slot, Slots
from device_runtime.backends.cuda.uploads import Uploads
from device_runtime.backends.cuda.workspace import RING_SIZE, StepLimits
from device_runtime.backends.rope import inverse_frequencies
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.errors import InternalError, PackageError
from device_runtime.kernels.libcuda import Stream
from device_runtime.kernels.reference.embedding import turns
from device_runtime.kernels.sampling_row import SAMPLING_ROW, sampling_row

_EMPTY = 2**64 - 1
_NO_TOKEN = 0xFFFFFFFF
"""What the sampler writes where the logits are not finite."""
_NEVER = 1 << 30
"""A last position that no sequence reaches: the engine itself ends sequences."""
_SPINS = 200
_NAP_S = 50e-6
_NAPS_OF_A_LENGTH = 16
_LONGEST_NAP_S = 1e-3
"""Naps grow to about a fiftieth of the wait: a slow board's core sleeps, a fast one's token does
not wait long."""
_CHECK_EVERY = 500
"""Looks at the ring after which the device is asked whether it still runs: 0.15 s of naps at first,
then 0.5 s."""


@dataclass
class Awaited:
    """A token that a step will choose.

    Attributes:
        sequence_id: whose.
        slot: the row that the sequence had in that step.
        position: of the token.
        token_id: once it was read, which is when it is asked for or its place is needed.
    """

    sequence_id: int
    slot: int
    position: int
    token_id: int | None = None


class StepState:
    """Rows of state, one a sequence, on the device; their books on the host."""

    def __init__(
        self,
        driver: CudaDriver,
        stream: Stream,
        limits: StepLimits,
        buffers: dict[str, int],
        uploads: Uploads,
    ) -> None:
        self._driver = driver
        self._stream = stream
        self._limits = limits
        self._buffers = buffers
        self._uploads = uploads
        self.slots = Slots(limits.num_slots)
        self._ring_memory: PinnedMemory = driver.allocate_pinned(limits.ring_bytes)
        self._ring_memory.bytes[:] = 0xFF  # every entry is _EMPTY
        # Entries are read and written as Python's numbers, which numpy's scalars are slow for.
        self._ring = memoryview(self._ring_memory.bytes.view(np.uint64))  # type: ignore[arg-type]
        self._awaited: dict[int, Awaited] = {}
        self._fill(buffers["positions"], IDLE, limits.num_slots)
        self._fill(buffers["last_positions"], _NEVER, limits.num_slots)
        self._fill(buffers["stop_ids"], -1, 8 * limits.num_slots)

    @property
    def ring_address(self) -> int:
        """Where kernels write tokens."""
        return self._ring_memory.device_address

    def open_slot(self, sequence_id: int, sampling: SamplingParams, rope_theta: float) -> Slot:
        """Give a new sequence a row and write what stays the same in it."""
        slot = self.slots.take(sequence_id, sampling, rope_theta)
        record = sampling_row(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            penalty=sampling.repetition_penalty,
            seed=sampling.seed,
        )
        self._uploads.put(self._buffers["sampling"] + record.nbytes * slot.index, record)
        angles = turns(inverse_frequencies(self._limits.model, rope_theta))
        self._uploads.put(self._buffers["turns"] + angles.nbytes * slot.index, angles)
        if sampling.repetition_penalty != 1.0:
            words = self._limits.seen_words
            self._fill(self._buffers["seen"] + 4 * words * slot.index, 0, words)
        return slot

    def set_pages(self, slot: Slot, pages: tuple[int, ...]) -> None:
        """Write the entries of a row's page table from the first that differs."""
        known = self.slots.pages[slot.index]
        if known == pages:
            return
        self.slots.pages[slot.index] = pages
        same = takewhile(lambda pair: pair[0] == pair[1], zip(known, pages, strict=False))
        first = sum(1 for _ in same)
        base = self._buffers["page_table"] + 4 * self._limits.max_pages * slot.index
        if len(pages) - first == 1:
            self._fill(base + 4 * first, pages[first], 1)
        else:
            self._uploads.put(base + 4 * first, np.array(pages[first:], np.int32))

    def set_position(self, slot: int, position: int) -> None:
        """Let a row stand at a position, or be idle."""
        if self.slots.positions[slot] != position:
            self._fill(self._buffers["positions"] + 4 * slot, position, 1)
            self.slots.positions[slot] = position

    def expect(self, sequence_id: int, slot: int, position: int) -> Awaited:
        """Prepare the ring for the token that a step will choose for a position."""
        place = RING_SIZE * slot + position % RING_SIZE
        earlier = self._awaited.get(place)
        if earlier is not None:  # of another sequence that had the row: read it before it is gone
            self.take_token(earlier)
        self._ring[place] = _EMPTY
        self.slots.positions[slot] = self.slots.chosen[slot] = position
        awaited = self._awaited[place] = Awaited(sequence_id, slot, position)
        return awaited

    def move(self, slot: Slot, place: int) -> None:
        """Give a sequence another row; tokens of earlier steps still come in the old one."""
        words = {
            "tokens": 1,
            "positions": 1,
            "seen": self._limits.seen_words,
            "sampling": SAMPLING_ROW.itemsize // 4,
            "turns": self._limits.model.head_dim,
            "page_table": self._limits.max_pages,
        }
        for name, count in words.items():
            base = self._buffers[name]
            source, target = base + 4 * count * slot.index, base + 4 * count * place
            self._driver.copy_on_device(target, source, 4 * count, self._stream)
        old = slot.index
        self.slots.move(slot, place)
        self._fill(self._buffers["positions"] + 4 * old, IDLE, 1)
        self.slots.positions[old] = IDLE

    def reset(self) -> None:
        """Make every row idle after a failure."""
        self._fill(self._buffers["positions"], IDLE, self._limits.num_slots)
        self.slots.stop_all()
        self._awaited.clear()

    def take_token(self, awaited: Awaited) -> int:
        """Return a token, once its step has chosen it.

        Raises:
            DeviceError: the device failed.
            PackageError: the logits were not finite.
        """
        if awaited.token_id is not None:
            return awaited.token_id
        position = awaited.position
        place = RING_SIZE * awaited.slot + position % RING_SIZE
        num_waits = 0
        while True:
            word = self._ring[place]
            if word >> 32 == position:
                break
            num_waits += 1
            if num_waits > _SPINS:
                num_steps = 1 + (num_waits - _SPINS) // _NAPS_OF_A_LENGTH
                time.sleep(min(_NAP_S * num_steps, _LONGEST_NAP_S))
            if num_waits % _CHECK_EVERY == 0:
                is_done = self._driver.check(self._stream)
                if is_done and self._ring[place] >> 32 != position:
                    raise InternalError(f"the device chose no token for position {position}")
        del self._awaited[place]
        token_id = word & _NO_TOKEN
        if token_id == _NO_TOKEN:
            raise PackageError(
                f"the logits at position {position} are not finite; verify the package or "
                "convert it again"
            )
        awaited.token_id = token_id
        return token_id

    def close(self) -> None:
        """Free the ring; the stream must be idle."""
        self._ring.release()
        self._driver.free_pinned(self._ring_memory)

    def _fill(self, address: int, value: int, num_words: int) -> None:
        self._driver.call(
            "cuMemsetD32Async",
            c_ulonglong(address),
            c_uint(value & 0xFFFFFFFF),
            c_size_t(num_words),
            self._stream.pointer,
        )
