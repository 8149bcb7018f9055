"""Which tokens of which sequences make the next step, and which pages they use.

Pure bookkeeping. Decoding sequences come first, one token each, then prompts in chunks, oldest
first, until the step's tokens are used up. A chunk is as long as a step's tokens are, or what is
left of the prompt, so that its cuts, which the last bits of its numbers depend on, are not moved by
what shares the step. Tokens found in pages of others, and a preemption, do move them. One that does
not fit any more waits for the next step.

When no page is left the idle session that waited longest gives its pages back, then the newest
sequence is preempted: it loses its pages and is computed again from its tokens once there is room.
Since no sequence outgrows the cache, the oldest one always goes on.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from collections.abc import Sequence as Items

from device_runtime.engine.page_pool import PagePool, page_digest
from device_runtime.engine.sequence import Row, Sequence
from device_runtime.engine.session import Session
from device_runtime.errors import InternalError


class Scheduler:
    """Owns the sequences that run or wait and the sessions that idle."""

    def __init__(self, pool: PagePool, *, max_batch_size: int, max_tokens_per_step: int) -> None:
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_tokens_per_step = max_tokens_per_step
        self.num_preemptions = 0
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._idle: OrderedDict[int, Session] = OrderedDict()
        self._dropped: list[Sequence] = []
        self._num_left = 0  # tokens of prompts that the step being planned can still take

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for pages or for a place in the batch."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        bisect.insort(self._waiting, sequence, key=_age)

    def schedule(self) -> tuple[Row, ...]:
        """Plan one step and count its tokens as planned; empty when nothing can run now."""
        rows: list[Row] = []
        before = self.num_preemptions
        self._num_left = self.max_tokens_per_step
        counts = [(sequence, sequence.num_to_feed) for sequence in self._running]
        for sequence, count in counts:
            if count == 1:
                self._plan(sequence, rows)
        for sequence, count in counts:
            if count > 1:
                self._plan(sequence, rows)
        if self.num_preemptions == before:  # else what was just taken away would come right back
            self._admit(rows)
        for row in rows:
            _commit(row)
        return tuple(rows)

    def collect(
        self, rows: Items[Row], drawn: Items[tuple[int, int]]
    ) -> list[tuple[Sequence, int]]:
        """Take in a finished step; return the sequences that got a token they still want.

        Args:
            rows: of the step.
            drawn: (sequence_id, token_id) for each row with ``is_sampled``, in order.

        Raises:
            InternalError: the tokens are those of another step.
        """
        expected = [row.sequence.sequence_id for row in rows if row.is_sampled]
        if [sequence_id for sequence_id, _ in drawn] != expected:
            raise InternalError(
                f"the backend drew for {[i for i, _ in drawn][:8]}, expected {expected[:8]}"
            )
        token_ids = deque(token_id for _, token_id in drawn)
        news = []
        for row in rows:
            sequence = row.sequence
            sequence.num_in_flight -= 1
            token_id = token_ids.popleft() if row.is_sampled else None
            if sequence.is_finished:
                continue
            if row.num_preemptions == sequence.num_preemptions:
                sequence.num_computed = row.end
            if token_id is not None:
                sequence.num_pending -= 1
                sequence.token_ids.append(token_id)
                news.append((sequence, token_id))
            self._register(sequence)
        return news

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out; its pages go to its session, or back to the pool."""
        sequence.is_finished = True
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        session = sequence.session
        if session is not None and sequence.is_admitted:
            kept = -(-sequence.num_computed // self.pool.page_size)
            session.pages, rest = sequence.pages[:kept], sequence.pages[kept:]
            session.token_ids = sequence.token_ids[: sequence.num_computed]
            sequence.pages = rest
        if session is not None:
            session.is_busy = False
            if session.pages:
                self._idle[session.session_id] = session
                self._idle.move_to_end(session.session_id)
        self._release(sequence)
        self._drop(sequence)

    def close_session(self, session: Session) -> None:
        """Take back the pages of an idle session."""
        self._idle.pop(session.session_id, None)
        self.pool.release(reversed(session.pages))
        session.pages, session.token_ids = [], []

    def take_page(self) -> int | None:
        """Return a page, from an idle session where no other is left; None when all are in use."""
        page = self.pool.allocate()
        while page is None and self._idle:
            self.close_session(next(iter(self._idle.values())))
            page = self.pool.allocate()
        return page

    def take_forgettable(self) -> list[int]:
        """Return ids of sequences that lost their place and have no step outstanding."""
        if not self._dropped:
            return []
        ready = [s.sequence_id for s in self._dropped if not s.num_in_flight and s.is_known]
        for sequence in self._dropped:
            if not sequence.num_in_flight:
                sequence.is_known = False
        self._dropped = [sequence for sequence in self._dropped if sequence.num_in_flight]
        return ready

    def check_integrity(self) -> None:
        """Compare the pages that sequences and sessions hold with the pool's books.

        Raises:
            InternalError: they differ, or a sequence holds too few pages for its tokens.
        """
        holders: dict[int, int] = {}
        held = [s.pages for s in self._running] + [s.pages for s in self._idle.values()]
        for pages in held:
            for page in pages:
                holders[page] = holders.get(page, 0) + 1
        self.pool.check_integrity(holders)
        for sequence in self._running:
            if len(sequence.pages) * self.pool.page_size < sequence.num_planned:
                raise InternalError(
                    f"sequence {sequence.sequence_id} has {len(sequence.pages)} pages for "
                    f"{sequence.num_planned} tokens"
                )
        for waiting in self._waiting:
            if waiting.pages:
                raise InternalError(f"sequence {waiting.sequence_id} waits with pages")

    def _plan(self, sequence: Sequence, rows: list[Row]) -> None:
        """Add the sequence's next chunk to the step, if there is room and there are pages."""
        count = self._chunk(sequence)
        if sequence not in self._running or count == 0 or _cost(count) > self._num_left:
            return
        end = sequence.num_planned + count
        if not self._reserve(sequence, end, rows):
            return
        self._num_left -= _cost(count)
        rows.append(
            Row(
                sequence,
                start=sequence.num_planned,
                end=end,
                is_sampled=end == sequence.num_tokens,
                is_chained=sequence.num_planned >= len(sequence.token_ids),
                is_new=not sequence.is_known,
                num_preemptions=sequence.num_preemptions,
            )
        )

    def _chunk(self, sequence: Sequence) -> int:
        """Return how many tokens of a sequence a step takes, if any."""
        return min(sequence.num_to_feed, self.max_tokens_per_step)

    def _reserve(self, sequence: Sequence, num_tokens: int, rows: list[Row]) -> bool:
        """Give a running sequence pages for so many tokens; False when it was preempted itself."""
        while len(sequence.pages) * self.pool.page_size < num_tokens:
            page = self.take_page()
            if page is not None:
                sequence.pages.append(page)
                continue
            newest = self._running[-1]
            if newest is sequence and len(self._running) == 1:
                raise InternalError(
                    f"sequence {sequence.sequence_id} alone needs more than the "
                    f"{self.pool.num_pages} pages there are for {num_tokens} tokens"
                )
            self._preempt(newest, rows)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, rows: list[Row]) -> None:
        self.num_preemptions += 1
        self._num_left += sum(_cost(row.num_tokens) for row in rows if row.sequence is sequence)
        rows[:] = [row for row in rows if row.sequence is not sequence]
        self._running.remove(sequence)
        self._release(sequence)
        sequence.digests = []
        sequence.num_planned = sequence.num_computed = 0
        sequence.num_preemptions += 1
        self._drop(sequence)
        self.add(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Have the backend forget it in time; one that was preempted may be in the list already."""
        if sequence not in self._dropped:
            self._dropped.append(sequence)

    def _admit(self, rows: list[Row]) -> None:
        """Start waiting sequences, in order, while places, tokens and pages last."""
        while self._waiting and len(self._running) < self.max_batch_size:
            sequence = self._waiting[0]
            # After a preemption its last tokens may not be known yet, or its state not dropped.
            is_settled = not sequence.num_in_flight and sequence not in self._dropped
            if not self._num_left or not is_settled:
                return
            self._claim(sequence)
            if not self._has_room(sequence):
                self._release(sequence)
                sequence.num_planned = sequence.num_computed = 0
                return
            if not sequence.is_admitted:
                sequence.is_admitted = True
                sequence.num_cached_tokens = sequence.num_planned
            self._waiting.pop(0)
            bisect.insort(self._running, sequence, key=_age)
            if _cost(self._chunk(sequence)) > self._num_left:
                return  # it keeps what it has claimed, and is first in the next step
            self._plan(sequence, rows)

    def _claim(self, sequence: Sequence) -> None:
        """Give a sequence the pages that already hold the start of its tokens.

        One token is always left to compute: the logits after it are wanted.
        """
        size = self.pool.page_size
        limit = len(sequence.token_ids) - 1
        found = self.pool.find_prefix(sequence.token_ids, sequence.root, limit)
        session = sequence.session
        if session is None or not session.pages:
            sequence.pages = found
            sequence.num_planned = sequence.num_computed = len(found) * size
            return
        self._idle.pop(session.session_id, None)
        count = _common_prefix(session.token_ids, sequence.token_ids[:limit])
        kept = -(-count // size)
        if count % size and not self.pool.is_writable(session.pages[kept - 1]):
            kept -= 1
            count = kept * size
        own, rest = session.pages[:kept], session.pages[kept:]
        session.pages, session.token_ids = [], []
        if len(found) * size > count:
            count, found, own = len(found) * size, own, found
        self.pool.release(reversed(rest))
        self.pool.release(reversed(found))
        sequence.pages = own
        sequence.num_planned = sequence.num_computed = count

    def _has_room(self, sequence: Sequence) -> bool:
        """Return whether the whole sequence fits beside the others, idle sessions put out."""
        needed = -(-len(sequence.token_ids) // self.pool.page_size) - len(sequence.pages)
        while self.pool.num_available < needed and self._idle:
            self.close_session(next(iter(self._idle.values())))
        return self.pool.num_available >= needed

    def _register(self, sequence: Sequence) -> None:
        """Make the full pages of a sequence findable as soon as their tokens are known."""
        size = self.pool.page_size
        while (len(sequence.digests) + 1) * size <= sequence.num_computed:
            index = len(sequence.digests)
            parent = sequence.digests[-1] if sequence.digests else sequence.root
            digest = page_digest(parent, sequence.token_ids[index * size : (index + 1) * size])
            self.pool.register(sequence.pages[index], digest)
            sequence.digests.append(digest)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(reversed(sequence.pages))
        sequence.pages = []


def _cost(num_tokens: int) -> int:
    """Return what so many tokens take of a step's; one alone, as all that decode have, nothing."""
    return num_tokens if num_tokens > 1 else 0


def _commit(row: Row) -> None:
    sequence = row.sequence
    sequence.num_planned = row.end
    sequence.num_pending += row.is_sampled
    sequence.num_in_flight += 1
    sequence.is_known = True


def _age(sequence: Sequence) -> int:
    return sequence.sequence_id


def _common_prefix(first: Items[int], second: Items[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
