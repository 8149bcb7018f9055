"""Rows of the scheduler to arrays for a backend."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from device_runtime.backends.base import Batch
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.sequence import Row

_EMPTY = np.zeros(0, np.int32)


def build_batch(rows: Items[Row], max_pages: int) -> Batch:
    """Return the arrays of one step.

    Args:
        rows: of `Scheduler.schedule`, not empty.
        max_pages: width of the page table.
    """
    tokens: list[int] = []
    positions = []
    page_table = np.zeros((len(rows), max_pages), np.int32)
    for index, row in enumerate(rows):
        tokens.extend([0] if row.is_chained else row.sequence.token_ids[row.start : row.end])
        positions.append(np.arange(row.start, row.end, dtype=np.int32))
        pages = row.sequence.pages
        page_table[index, : len(pages)] = pages
    lengths = [row.num_tokens for row in rows]
    return Batch(
        sequence_ids=tuple(row.sequence.sequence_id for row in rows),
        token_ids=np.array(tokens, np.int32),
        positions=np.concatenate(positions),
        query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        num_cached=np.array([row.start for row in rows], np.int32),
        page_table=page_table,
        rope_theta=np.array([row.sequence.rope_theta for row in rows], np.float64),
        sampling=tuple(row.sequence.sampling for row in rows),
        is_sampled=np.array([row.is_sampled for row in rows], bool),
        is_chained=np.array([row.is_chained for row in rows], bool),
        history=tuple(
            np.array(row.sequence.token_ids[: row.end], np.int32) if row.is_new else _EMPTY
            for row in rows
        ),
    )


def build_evaluation_batch(
    token_ids: Items[int], start: int, end: int, pages: Items[int], rope_theta: float
) -> Batch:
    """Return the arrays of tokens ``start`` to ``end`` of one sequence that samples nothing.

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
        query_start=np.array([0, end - start], np.int32),
        num_cached=np.array([start], np.int32),
        page_table=np.array([pages], np.int32),
        rope_theta=np.array([rope_theta], np.float64),
        sampling=(SamplingParams(temperature=0.0),),
        is_sampled=np.zeros(1, bool),
        is_chained=np.zeros(1, bool),
        history=(_EMPTY,),
    )
