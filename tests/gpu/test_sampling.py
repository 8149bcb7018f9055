"""The sampler on the GPU: the reference's tokens, and their frequencies."""

from __future__ import annotations

from collections.abc import Iterator

import figures
import numpy as np
import pytest
from device_launch import ArrayLaunch, device_launch
from sampling_cases import SETTINGS, check_frequencies, check_sampling


@pytest.fixture(scope="module")
def launch() -> Iterator[ArrayLaunch]:
    with device_launch("sample_top", "sample_draw", "mark_seen") as launch:
        yield launch


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("vocab_size", [1003, 32000, 151936])
@pytest.mark.parametrize("is_half", [True, False])
def test_tokens_are_those_of_the_reference(
    launch: ArrayLaunch, name: str, vocab_size: int, is_half: bool
) -> None:
    check_sampling(launch, SETTINGS[name], vocab_size, is_half=is_half)


def test_tokens_come_as_often_as_their_probability_says(launch: ArrayLaunch) -> None:
    chi_square = check_frequencies(launch, draws=20000, vocab_size=64)
    figures.note("sampler's chi-square, 63 degrees of freedom", chi_square)


def test_prompts_are_marked_as_seen(launch: ArrayLaunch) -> None:
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, 5000, 3000).astype(np.int32)
    rows = rng.integers(0, 4, 3000).astype(np.int32)
    seen = np.zeros((4, 157), np.uint32)
    launch("mark_seen", (3, 1, 1), [seen, tokens, rows, 3000, 157])
    want = np.zeros((4, 157 * 32), bool)
    want[rows, tokens] = True
    bits = np.unpackbits(seen.view(np.uint8), axis=1, bitorder="little").astype(bool)
    assert (bits == want).all()
