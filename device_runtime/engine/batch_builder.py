"""Rows of the scheduler to a batch for a backend."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from device_runtime.backends.base import Batch
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.sequence import Row

_EMPTY = np.zeros(0, np.int32)


def build_batch(rows: Items[Row]) -> Batch:
    """Return one step of a backend.

    Args:
        rows: of `Scheduler.schedule`, not empty.
    """
    tokens: list[int] = []
    positions: list[int] = []
    query_start = [0]
    for row in rows:
        if row.is_chained:
            tokens.append(0)
        else:
            tokens += row.sequence.token_ids[row.start : row.end]
        positions += range(row.start, row.end)
        query_start.append(len(tokens))
    sequences = [row.sequence for row in rows]
    return Batch(
        sequence_ids=tuple([sequence.sequence_id for sequence in sequences]),
        token_ids=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        query_start=tuple(query_start),
        num_cached=tuple([row.start for row in rows]),
        pages=tuple([tuple(sequence.pages) for sequence in sequences]),
        rope_theta=tuple([sequence.rope_theta for sequence in sequences]),
        sampling=tuple([sequence.sampling for sequence in sequences]),
        is_sampled=tuple([row.is_sampled for row in rows]),
        is_chained=tuple([row.is_chained for row in rows]),
        history=tuple(
            [
                np.array(row.sequence.token_ids[: row.end], np.int32) if row.is_new else _EMPTY
                for row in rows
            ]
        ),
    )


def build_evaluation_batch(
    token_ids: Items[int], start: int, end: int, pages: Items[int], rope_theta: float
) -> Batch:
    """Return tokens ``start`` to ``end`` of one sequence that samples nothing.

    Args:
        token_ids: of the whole sequence.
        start: tokens already in the pages.
        end: one past the last token of the step.
        pages: of the sequence, enough for ``end`` tokens.
        rope_theta: rotary base.
    """
    return Batch(
        sequence_ids=(-1,),
        token_ids=np.array(token_ids[start:end], np.int32),
        positions=np.arange(start, end, dtype=np.int32),
        query_start=(0, end - start),
        num_cached=(start,),
        pages=(tuple(pages),),
        rope_theta=(rope_theta,),
        sampling=(SamplingParams(temperature=0.0),),
        is_sampled=(False,),
        is_chained=(False,),
        history=(_EMPTY,),
    )
