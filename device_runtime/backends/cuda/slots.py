"""Which row of the device's state belongs to which sequence, and what that row holds.

The host plans every position, so it knows the state without asking: what differs from a plan is
all that has to be written before a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.errors import InternalError

IDLE = -1
"""Position of a slot that takes no part in a step."""


@dataclass
class Slot:
    """A sequence's row.

    Attributes:
        index: of the row; changes when the sequence moves.
        sampling: how its tokens are drawn.
        rope_theta: of its rotary angles.
    """

    index: int
    sampling: SamplingParams
    rope_theta: float


class Slots:
    """The books: a free row for a new sequence, the lowest first.

    Attributes:
        positions: what the device holds for each row after all that was enqueued.
        chosen: position of the newest token that the device chose for each row and will feed next;
            `IDLE` where there is none.
        pages: how the device's page table begins, for each row.
    """

    def __init__(self, num_slots: int) -> None:
        self.positions = [IDLE] * num_slots
        self.chosen = [IDLE] * num_slots
        self.pages: list[tuple[int, ...]] = [()] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._by_sequence: dict[int, Slot] = {}

    def get(self, sequence_id: int) -> Slot | None:
        """Return a sequence's slot, None where it has none."""
        return self._by_sequence.get(sequence_id)

    def take(self, sequence_id: int, sampling: SamplingParams, rope_theta: float) -> Slot:
        """Give a sequence the lowest free slot.

        Raises:
            InternalError: all are taken.
        """
        if not self._free:
            raise InternalError(f"all {len(self.positions)} slots of the device are taken")
        slot = Slot(self._free.pop(), sampling, rope_theta)
        self._by_sequence[sequence_id] = slot
        self.chosen[slot.index] = IDLE
        return slot

    def drop(self, sequence_id: int) -> None:
        """Free a sequence's slot, if it has one."""
        slot = self._by_sequence.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot.index)
            self._free.sort(reverse=True)

    def plan_moves(self, decoding: list[Slot], width: int) -> list[tuple[Slot, int]]:
        """Return moves, in order, that bring all decoding slots below ``width``.

        A narrow graph serves them then. Who does not decode makes way to a free row beyond.
        """
        if all(slot.index < width for slot in decoding):
            return []
        inside = {slot.index for slot in decoding if slot.index < width}
        places = (index for index in range(width) if index not in inside)
        taken = {slot.index: slot for slot in self._by_sequence.values()}
        beyond = (index for index in self._free[::-1] if index >= width)
        moves: list[tuple[Slot, int]] = []
        for slot in decoding:
            if slot.index < width:
                continue
            place = next(places)
            if place in taken:
                moves.append((taken[place], next(beyond)))
            moves.append((slot, place))
        return moves

    def move(self, slot: Slot, place: int) -> None:
        """Note that a sequence now has a row that was free."""
        self._free.remove(place)
        self._free.append(slot.index)
        self._free.sort(reverse=True)
        self.positions[place] = self.positions[slot.index]
        self.chosen[place] = self.chosen[slot.index]
        self.pages[place] = self.pages[slot.index]
        slot.index = place

    def stop_all(self) -> None:
        """Note that every row is idle, and that of page tables nothing is sure."""
        self.positions = [IDLE] * len(self.positions)
        self.chosen = [IDLE] * len(self.chosen)
        self.pages = [()] * len(self.pages)

    @property
    def num_taken(self) -> int:
        """Sequences with a slot."""
        return len(self._by_sequence)
