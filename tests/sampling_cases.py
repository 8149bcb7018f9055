"""Launches of the sampling and embedding kernels, held to their references; as attention_cases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.reference.sampler import sample
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.kernels.reference import embedding
from device_runtime.kernels.sampling_row import DRAW_SHARED_BYTES, STOP_IDS, sampling_row

Launch = Callable[..., None]

SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "greedy with a penalty": SamplingParams(temperature=0.0, repetition_penalty=1.2),
    "defaults": SamplingParams(),
    "top-p alone": SamplingParams(top_k=0),
    "no filter": SamplingParams(top_k=0, top_p=1.0),
    "top-k of 1": SamplingParams(top_k=1, top_p=0.5),
    "a wide top-k": SamplingParams(top_k=3000, top_p=0.9, temperature=3.0),
    "min-p": SamplingParams(top_k=50, top_p=1.0, min_p=0.05),
    "a penalty": SamplingParams(repetition_penalty=1.3),
    "hot, with all filters": SamplingParams(top_k=0, top_p=0.999, temperature=2.0, min_p=0.001),
}
RING_SIZE = 16


def with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        seed=seed,
    )


class Rows:
    """The state of some rows, and one step of them."""

    def __init__(
        self, logits: NDArray[np.generic], vocab_size: int, params: list[SamplingParams]
    ) -> None:
        rows = len(params)
        self.logits, self.vocab_size, self.params = logits, vocab_size, params
        self.rng = np.random.default_rng(vocab_size)
        words = -(-vocab_size // 32)
        self.seen = self.rng.integers(0, 2**32, (rows, words), dtype=np.uint32)
        self.positions = self.rng.integers(0, 5000, rows).astype(np.int32)
        self.tokens = np.full(rows, 7, np.int32)
        self.ring = np.zeros((rows, RING_SIZE), np.uint64)
        self.stop_ids = np.full((rows, STOP_IDS), -1, np.int32)
        self.last_positions = np.full(rows, 1 << 20, np.int32)

    def step(self, launch: Launch) -> None:
        rows, stride = self.logits.shape
        kind = "f16" if self.logits.dtype == np.float16 else "f32"
        records = [
            sampling_row(
                temperature=p.temperature,
                top_k=p.top_k,
                top_p=p.top_p,
                min_p=p.min_p,
                penalty=p.repetition_penalty,
                seed=p.seed or 0,
            )
            for p in self.params
        ]
        sampling = np.concatenate(records).view(np.uint8)
        top, best = np.zeros(rows, np.uint64), np.zeros(rows, np.uint64)
        tickets = np.zeros(rows, np.uint32)
        state = [self.tokens, self.positions, self.seen, self.ring, self.logits, sampling]
        state += [self.stop_ids, self.last_positions, None]
        sizes = [self.vocab_size, stride, self.seen.shape[1], RING_SIZE]
        launch(f"sample_top_{kind}", (3, rows, 1), [top, best, tickets, *state, *sizes], 0)
        assert (best == 0).all() and (tickets == 0).all()
        if any(p.temperature for p in self.params):
            arguments = [top, *state, *sizes]
            launch(f"sample_draw_{kind}", (rows, 1, 1), arguments, DRAW_SHARED_BYTES)


def check_sampling(
    launch: Launch, params: SamplingParams, vocab_size: int, *, rows: int = 8, is_half: bool = False
) -> None:
    """The same tokens as the reference, and the state moved on."""
    rng = np.random.default_rng(1)
    stride = -(-vocab_size // 8) * 8
    logits = (rng.standard_normal((rows, stride)) * 3).astype(np.float16 if is_half else np.float32)
    seeds = rng.integers(0, 2**62, rows).tolist()
    state = Rows(logits, vocab_size, [with_seed(params, seed) for seed in seeds])
    positions, seen = state.positions.copy(), state.seen.copy()
    state.step(launch)
    assert (state.positions == positions + 1).all()
    for row in range(rows):
        bits = np.unpackbits(seen[row].view(np.uint8), bitorder="little")[:vocab_size].astype(bool)
        values = logits[row, :vocab_size].astype(np.float32)
        next_position = int(positions[row]) + 1
        want = sample(values, state.params[row], next_position, bits)
        assert state.tokens[row] == want
        assert int(state.ring[row, next_position % RING_SIZE]) == next_position << 32 | want
        assert state.seen[row, want // 32] >> (want % 32) & 1


def check_embedding(launch: Launch, *, is_half: bool) -> None:
    """Rows of the table exactly, angles of far positions within 3e-7."""
    rng = np.random.default_rng(2)
    num_tokens, hidden_size, vocab_size, pairs = 13, 576, 100, 32
    values = rng.standard_normal((vocab_size, hidden_size)).astype(np.float32)
    if is_half:
        table = values.astype(np.float16).view(np.uint16)
        wide = table.view(np.float16).astype(np.float32)
    else:
        table = (values.view(np.uint32) >> 16).astype(np.uint16)
        wide = (table.astype(np.uint32) << 16).view(np.float32)
    tokens = rng.integers(0, vocab_size, num_tokens).astype(np.int32)
    positions = rng.integers(0, 1 << 20, num_tokens).astype(np.int32)
    positions[3] = -1
    rows = rng.integers(0, 3, num_tokens).astype(np.int32)
    frequencies = 10000.0 ** (-np.arange(pairs) / pairs)
    turns = np.stack([embedding.turns(frequencies * (1 + row)) for row in range(3)])
    residual = np.full((num_tokens, hidden_size), np.nan, np.float32)
    rotation = np.full((num_tokens, pairs, 2), np.nan, np.float32)
    scales = np.full(num_tokens, np.nan, np.float32)
    trained, scale, factor = 4096, 0.3, float(1 / np.log(4096))
    arguments = [residual, rotation, scales, table, tokens, positions, rows, turns]
    arguments += [hidden_size, pairs, trained, scale, factor]
    launch("embed_f16" if is_half else "embed_bf16", (2, num_tokens, 1), arguments, 0)
    want = wide[tokens]
    want[3] = 0
    assert (residual == want).all()
    for i in range(num_tokens):
        angles = embedding.rotation(positions[i : i + 1].clip(0), turns[rows[i]])[0]
        # fp32 of a half turn times pi, and its sine: 3 roundings of 2^-24.
        assert np.abs(rotation[i] - angles).max() < 3e-7
    want_scales = embedding.query_scales(positions, scale, trained, factor)
    assert np.abs(scales / want_scales - 1).max() < 1e-6


def check_frequencies(launch: Launch, *, draws: int, vocab_size: int) -> float:
    """Draw one row of logits with many seeds; return the chi-square of the tokens' counts."""
    one = np.random.default_rng(5).standard_normal(vocab_size).astype(np.float32)
    params = [
        SamplingParams(temperature=0.7, top_k=0, top_p=1.0, seed=seed) for seed in range(draws)
    ]
    rows = Rows(np.tile(one, (draws, 1)), vocab_size, params)
    rows.step(launch)
    weights = np.exp(one.astype(np.float64) / 0.7)
    expected = weights / weights.sum() * draws
    assert expected.min() > 1  # else the sum is no chi-square
    counts = np.bincount(rows.tokens, minlength=vocab_size)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Mean: the degrees of freedom; five standard deviations above.
    freedom = vocab_size - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    return chi_square
