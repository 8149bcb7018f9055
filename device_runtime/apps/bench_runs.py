"""Rounds of generation whose times are taken, and what they add up to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, GenerationParams

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Workload:
    """One line of the table.

    Attributes:
        prompt_tokens: of each sequence.
        completion_tokens: of each sequence.
        concurrency: sequences that start together.
    """

    prompt_tokens: int
    completion_tokens: int
    concurrency: int


@dataclass(frozen=True)
class Round:
    """What one round took.

    Attributes:
        ttft_s: from the request to the first token, of each sequence.
        token_times_s: between tokens of a sequence, all sequences.
        decode_s: from the last first token to the end.
        num_decoded: tokens in that time.
    """

    ttft_s: tuple[float, ...]
    token_times_s: tuple[float, ...]
    decode_s: float
    num_decoded: int

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second of all sequences together; 0.0 with one token each."""
        return self.num_decoded / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class Result:
    """What the rounds of a workload add up to; times in seconds.

    Attributes:
        workload: what ran.
        rounds: that count.
        ttft_s: median over rounds of the mean over sequences.
        prefill_tok_s: prompt tokens of all sequences over the time to the last first token, median.
        decode_tok_s: (median, min, max) over rounds, all sequences together.
        token_time_s: by percentile, over all tokens.
        bytes_per_step: read from memory in a decode step: weights and KV cache.
        read_bytes_s: that over the median time of a step.
    """

    workload: Workload
    rounds: int
    ttft_s: float
    ttft_min_s: float
    ttft_max_s: float
    prefill_tok_s: float
    decode_tok_s: float
    decode_tok_s_min: float
    decode_tok_s_max: float
    token_time_s: dict[int, float]
    bytes_per_step: int
    read_bytes_s: float


def run_workload(
    engine: Engine,
    workload: Workload,
    *,
    warm_up: int,
    repeats: int,
    sampling: SamplingParams,
    bytes_per_step: int,
    on_round: Callable[[], None] = lambda: None,
) -> Result:
    """Run a workload several times.

    Args:
        engine: with nothing running.
        workload: what to run.
        warm_up: rounds that do not count.
        repeats: rounds that do.
        sampling: of every sequence.
        bytes_per_step: that a decode step reads.
        on_round: called after each round.
    """
    rounds = []
    for index in range(warm_up + repeats):
        measured = run_round(engine, workload, sampling, seed=index)
        if index >= warm_up:
            rounds.append(measured)
        on_round()
    return summarize(workload, rounds, bytes_per_step)


def run_round(engine: Engine, workload: Workload, sampling: SamplingParams, seed: int) -> Round:
    """Run once, with prompts that no earlier round had."""
    rng = np.random.default_rng((seed, workload.prompt_tokens, workload.concurrency))
    params = GenerationParams(
        max_tokens=workload.completion_tokens, sampling=sampling, ignore_eos=True
    )
    shape = (workload.concurrency, workload.prompt_tokens)
    prompts = rng.integers(0, engine.vocab_size, shape).tolist()
    start = time.perf_counter()
    arrivals: dict[int, list[float]] = {engine.add(ids, params): [] for ids in prompts}
    unfinished = set(arrivals)
    while unfinished:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            arrivals[output.sequence_id] += [now] * len(output.token_ids)
            if output.finish_reason is not None:
                unfinished.discard(output.sequence_id)
    firsts = [times[0] for times in arrivals.values()]
    last_first = max(firsts)
    ends = [times[-1] for times in arrivals.values()]
    num_decoded = sum(sum(t > last_first for t in times) for times in arrivals.values())
    gaps = [b - a for times in arrivals.values() for a, b in pairwise(times)]
    return Round(
        ttft_s=tuple(first - start for first in firsts),
        token_times_s=tuple(gaps),
        decode_s=max(ends) - last_first,
        num_decoded=num_decoded,
    )


def summarize(workload: Workload, rounds: Sequence[Round], bytes_per_step: int) -> Result:
    """Return medians and spread of rounds."""
    ttft = [statistics.mean(measured.ttft_s) for measured in rounds]
    total = workload.prompt_tokens * workload.concurrency
    rates = [measured.decode_tok_s for measured in rounds]
    gaps = [gap for measured in rounds for gap in measured.token_times_s]
    decode_tok_s = statistics.median(rates)
    return Result(
        workload=workload,
        rounds=len(rounds),
        ttft_s=statistics.median(ttft),
        ttft_min_s=min(ttft),
        ttft_max_s=max(ttft),
        prefill_tok_s=statistics.median(total / max(measured.ttft_s) for measured in rounds),
        decode_tok_s=decode_tok_s,
        decode_tok_s_min=min(rates),
        decode_tok_s_max=max(rates),
        token_time_s={p: float(np.percentile(gaps, p)) if gaps else 0.0 for p in PERCENTILES},
        bytes_per_step=bytes_per_step,
        read_bytes_s=bytes_per_step * decode_tok_s / workload.concurrency,
    )
