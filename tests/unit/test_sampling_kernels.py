"""The sampling and embedding kernels on the emulator, against the reference sampler."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import emulator
from sampling_cases import SETTINGS, Rows, check_embedding, check_frequencies, check_sampling

from device_runtime.backends.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(
    not emulator.has_compiler(), reason="g++ builds the emulator; it runs where there is one"
)
GREEDY = SamplingParams(temperature=0.0)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_the_reference(name: str) -> None:
    check_sampling(emulator.launch, SETTINGS[name], 5003, rows=3, is_half=name == "defaults")


def test_tokens_come_as_often_as_their_probability_says() -> None:
    check_frequencies(emulator.launch, draws=600, vocab_size=8)


def rows_of_ties(params: SamplingParams) -> Rows:
    logits = np.random.default_rng(3).integers(0, 3, (2, 9000)).astype(np.float32)
    return Rows(logits, 9000, [params, params])


@pytest.mark.parametrize(
    "params", [SamplingParams(top_k=40, top_p=0.5, seed=1), SamplingParams(top_k=0, top_p=0.3)]
)
def test_equal_logits_stay_or_go_together(params: SamplingParams) -> None:
    rows = rows_of_ties(params)
    rows.step(emulator.launch)
    # A third of 9000 tokens have the largest logit: any cut lets all of them stay, and no other.
    assert (rows.logits[np.arange(2), rows.tokens] == 2).all()


def test_a_row_that_is_done_becomes_idle() -> None:
    logits = np.zeros((3, 64), np.float32)
    logits[:, 5] = 1
    rows = Rows(logits, 64, [GREEDY] * 3)
    rows.positions[:] = (10, 10, -1)
    rows.last_positions[:] = (11, 100, 100)
    rows.stop_ids[1, 2] = 5
    rows.step(emulator.launch)
    assert rows.tokens.tolist() == [5, 5, 7]  # the third was idle before
    assert rows.positions.tolist() == [-1, -1, -1]
    assert rows.ring[:, 11].tolist() == [11 << 32 | 5, 11 << 32 | 5, 0]


def test_logits_that_are_not_finite_end_a_row_with_a_negative_token() -> None:
    logits = np.zeros((2, 64), np.float32)
    logits[0, 9], logits[1, 3] = np.nan, np.inf
    rows = Rows(logits, 64, [GREEDY, SamplingParams(seed=1)])
    rows.positions[:] = 10
    rows.step(emulator.launch)
    assert rows.positions.tolist() == [-1, -1]
    assert (rows.ring[:, 11] & 0xFFFFFFFF).tolist() == [0xFFFFFFFF, 0xFFFFFFFF]


def test_prompts_are_marked_as_seen() -> None:
    seen = np.zeros((2, 4), np.uint32)
    tokens = np.array([0, 31, 32, 127, -1], np.int32)
    rows = np.array([0, 0, 1, 1, 1], np.int32)
    emulator.launch("mark_seen", (1, 1, 1), [seen, tokens, rows, 5, 4])
    assert seen.tolist() == [[0x80000001, 0, 0, 0], [0, 1, 0, 0x80000000]]


@pytest.mark.parametrize("is_half", [True, False])
def test_embeddings_angles_and_query_scales(is_half: bool) -> None:
    check_embedding(emulator.launch, is_half=is_half)
