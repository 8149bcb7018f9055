"""The self test's embedding, sampling and probes: every entry point against its twin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.cuda.array_launch import ArrayLaunch
from device_runtime.backends.cuda.selftest_linear import Check
from device_runtime.backends.reference.sampler import sample
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.kernels.reference import embedding
from device_runtime.kernels.sampling_row import (
    DRAW_SHARED_BYTES,
    SAMPLING_ROW,
    STOP_IDS,
    sampling_row,
)
from device_runtime.package_format import bfloat16

_MAGIC = 0x9E3779B9
"""The one value whose sum of words read_bandwidth writes down (read_bandwidth.cu)."""


def check_embedding(run: ArrayLaunch, rng: np.random.Generator) -> Iterator[Check]:
    """Yield the checks of the embedding, of fp16 and bf16 tables, and of the rotary angles."""
    table = rng.standard_normal((100, 576)).astype(np.float16)
    yield from _check_embed(run, "embed_f16", table, table.astype(np.float32), rng)
    bits = bfloat16.from_float32(table.astype(np.float32))
    yield from _check_embed(run, "embed_bf16", bits, bfloat16.to_float32(bits), rng)


def _check_embed(
    run: ArrayLaunch,
    name: str,
    table: NDArray[Any],
    values: NDArray[np.float32],
    rng: np.random.Generator,
) -> Iterator[Check]:
    count, hidden, pairs = 5, table.shape[1], 32
    tokens = rng.integers(0, 100, count).astype(np.int32)
    positions = rng.integers(0, 100_000, count).astype(np.int32)
    turns = embedding.turns(10000.0 ** (-np.arange(pairs) / pairs))[None]
    residual = np.full((count, hidden), np.nan, np.float32)
    rotation = np.full((count, pairs, 2), np.nan, np.float32)
    scales = np.full(count, np.nan, np.float32)
    rows = np.zeros(count, np.int32)
    arrays = (residual, rotation, scales, table, tokens, positions, rows, turns)
    run(name, (1, count, 1), (*arrays, hidden, pairs, 4096, 0.125, 0.0))
    yield Check(name, float(np.abs(residual - values[tokens]).max()), 0.0)
    angles = float(np.abs(rotation - embedding.rotation(positions, turns[0])).max())
    yield Check(f"{name}, angles", angles, 1e-6)


def check_sampling(run: ArrayLaunch, rng: np.random.Generator) -> Iterator[Check]:
    """Yield the check of the sampler: the share of rows that got another token."""
    cases = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=0, top_p=0.95, temperature=1.3),
        SamplingParams(seed=3, top_k=0, top_p=1.0, min_p=0.05),
        SamplingParams(seed=4, top_k=50, top_p=1.0, repetition_penalty=1.2),
    ]
    rows, vocab = len(cases), 2000
    words = -(-vocab // 32)
    logits = (3 * rng.standard_normal((rows, vocab))).astype(np.float32)
    positions = rng.integers(0, 5000, rows).astype(np.int32)
    tokens = rng.integers(0, vocab, 2 * rows).astype(np.int32)
    owners = np.repeat(np.arange(rows, dtype=np.int32), 2)
    seen = np.zeros((rows, words), np.uint32)
    run("mark_seen", (1, 1, 1), (seen, tokens, owners, len(tokens), words))
    flags = np.unpackbits(seen.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
    wanted_flags = np.zeros((rows, vocab), bool)
    wanted_flags[owners, tokens] = True
    yield Check("mark_seen", float((flags != wanted_flags).sum()), 0.0)
    for kind, values in (("f32", logits), ("f16", logits.astype(np.float16))):
        yield _check_sampler(run, kind, values, cases, positions.copy(), seen.copy(), flags)


def _check_sampler(
    run: ArrayLaunch,
    kind: str,
    logits: NDArray[Any],
    cases: list[SamplingParams],
    positions: NDArray[np.int32],
    seen: NDArray[np.uint32],
    flags: NDArray[np.bool_],
) -> Check:
    (rows, vocab), words, ring_size = logits.shape, seen.shape[1], 16
    want = [
        sample(logits[row].astype(np.float32), params, int(positions[row]) + 1, flags[row])
        for row, params in enumerate(cases)
    ]
    chosen = np.full(rows, -1, np.int32)
    ring = np.zeros((rows, ring_size), np.uint64)
    records = np.concatenate([_record(params) for params in cases]).view(np.uint8)
    top, best = np.zeros(rows, np.uint64), np.zeros(rows, np.uint64)
    tickets = np.zeros(rows, np.uint32)
    rules: tuple[Any, ...] = (
        records,
        np.full((rows, STOP_IDS), -1, np.int32),
        np.full(rows, 1 << 30, np.int32),
        None,
    )
    sizes = (vocab, vocab, words, ring_size)
    state = (chosen, positions, seen, ring, logits)
    run(f"sample_top_{kind}", (2, rows, 1), (top, best, tickets, *state, *rules, *sizes))
    run(f"sample_draw_{kind}", (rows, 1, 1), (top, *state, *rules, *sizes), DRAW_SHARED_BYTES)
    wrong = float((chosen != np.array(want)).mean())
    return Check(f"sample_top_{kind}, sample_draw_{kind}", wrong, 0.0)


def _record(params: SamplingParams) -> NDArray[np.void]:
    record: NDArray[np.void] = sampling_row(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        penalty=params.repetition_penalty,
        seed=params.seed,
    )
    return record.view(SAMPLING_ROW)


def check_probes(run: ArrayLaunch) -> Iterator[Check]:
    """Yield the checks of the kernels that measure the device."""
    data = np.zeros((4096, 4), np.uint32)
    data[-1, 2] = _MAGIC
    sink = np.zeros(1, np.uint32)
    run("read_bandwidth", (3, 1, 1), (sink, data, len(data)))
    yield Check("read_bandwidth", float(sink[0] != _MAGIC), 0.0)
    blocks, clocks = 2, 1000
    ids = np.full(blocks, 0xFFFFFFFF, np.uint32)
    spins = np.zeros((blocks, 2), np.uint64)
    run("sm_probe", (blocks, 1, 1), (ids, spins, clocks))
    is_wrong = (ids >= run.num_sms).any() or (spins[:, 0] < clocks).any()
    yield Check("sm_probe", float(is_wrong), 0.0)
