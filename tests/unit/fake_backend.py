"""A backend whose keys and values are the token ids themselves.

What it draws depends on every token it finds in a sequence's pages, so a wrong page, a lost token
or a stale prefix changes the answer; `next_token` says what the right one is.
"""

import zlib
from collections import deque
from itertools import pairwise

import numpy as np

from device_runtime.backends.memory_plan import MemorySurvey

EOS = 2
VOCAB = 320


def next_token(token_ids, *, stops=True):
    """The token after these: 1 in 40 is EOS where ``stops``, else one of the bytes."""
    number = zlib.crc32(np.asarray(token_ids, np.int32).tobytes())
    return EOS if stops and number % 40 == 0 else 3 + number // 40 % 256


def expected_answer(prompt, max_tokens, *, stops=True):
    """Tokens of the answer, the ending EOS not among them."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        token = next_token(tokens, stops=stops)
        if token == EOS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class FakeBackend:
    name = "fake"

    def __init__(self, max_steps_ahead=0, *, stops=True):
        self.max_steps_ahead = max_steps_ahead
        self.stops = stops
        self.outstanding = deque()
        self.newest = {}
        self.known = set()
        self.steps = []
        self.fails_at = None

    def survey(self, package, request, memory_limit_bytes):
        return MemorySurvey("fake", 1 << 30, 0, 0)

    def load(self, package, plan):
        self.plan = plan
        self.memory = np.full((plan.num_pages, plan.page_size), -1)

    def submit(self, batch):
        assert len(self.outstanding) <= self.max_steps_ahead, "ran too far ahead"
        if self.fails_at == len(self.steps):
            self.outstanding.clear()
            raise RuntimeError("the device is lost")
        self.steps.append(batch)
        counts = [end - start for start, end in pairwise(batch.query_start)]
        assert sum(count for count in counts if count > 1) <= self.plan.max_tokens_per_step
        assert len(set(batch.sequence_ids)) == batch.num_sequences <= self.plan.max_batch_size
        drawn = [self.run_row(batch, row) for row in range(batch.num_sequences)]
        self.outstanding.append((batch.sequence_ids, [pair for pair in drawn if pair]))

    def run_row(self, batch, row):
        sequence_id = batch.sequence_ids[row]
        start, end = batch.query_start[row : row + 2]
        tokens, positions = batch.token_ids[start:end], batch.positions[start:end]
        if batch.is_chained[row]:
            assert tokens.tolist() == [0]
            tokens = np.array([self.newest[sequence_id]])
        first = batch.num_cached[row]
        assert positions.tolist() == list(range(first, first + len(tokens)))
        pages = np.array(batch.pages[row])
        size = self.plan.page_size
        self.memory[pages[positions // size], positions % size] = tokens
        seen = np.arange(first + len(tokens))
        prefix = self.memory[pages[seen // size], seen % size]
        assert (prefix >= 0).all(), "reads a slot nobody wrote"
        if sequence_id in self.known:
            assert not len(batch.history[row])
        else:
            self.known.add(sequence_id)
            assert batch.history[row].tolist() == prefix.tolist()
        if not batch.is_sampled[row]:
            return None
        token = next_token(prefix, stops=self.stops)
        self.newest[sequence_id] = token
        return sequence_id, token

    def collect(self):
        return self.outstanding.popleft()[1]

    def logits(self, batch):
        return np.zeros((batch.num_tokens, VOCAB), np.float32)

    def forget(self, sequence_id):
        assert sequence_id in self.known, "forgets what it does not know"
        assert all(sequence_id not in ids for ids, _ in self.outstanding), "still outstanding"
        self.known.remove(sequence_id)

    def release(self, pages):
        self.memory[pages] = -1

    def close(self):
        self.memory = None
