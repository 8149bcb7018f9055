"""Logits of a whole text, for perplexity and for comparing backends."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.base import Backend
from device_runtime.backends.memory_plan import MemoryPlan
from device_runtime.backends.rope import planned_theta
from device_runtime.engine.batch_builder import build_evaluation_batch
from device_runtime.engine.scheduler import Scheduler
from device_runtime.errors import InternalError
from device_runtime.package_format.model_config import ModelConfig


def evaluate(
    backend: Backend,
    scheduler: Scheduler,
    plan: MemoryPlan,
    model: ModelConfig,
    token_ids: Items[int],
) -> Iterator[NDArray[np.float32]]:
    """Yield ``[chunk, vocab_size]`` fp32 logits of a text, computed afresh, chunk by chunk.

    Args:
        backend: with nothing outstanding.
        scheduler: gives the pages, which come back at the end.
        plan: sizes of chunks and pages.
        model: for the rotary base.
        token_ids: at most session_len.

    Raises:
        InternalError: pages are missing.
    """
    pages: list[int] = []
    theta = planned_theta(model, len(token_ids))
    try:
        for start in range(0, len(token_ids), plan.max_tokens_per_step):
            end = min(start + plan.max_tokens_per_step, len(token_ids))
            while len(pages) * plan.page_size < end:
                page = scheduler.take_page()
                if page is None:
                    raise InternalError(f"no page is free for token {end} although nothing runs")
                pages.append(page)
            yield backend.logits(build_evaluation_batch(token_ids, start, end, pages, theta))
    finally:
        scheduler.pool.release(reversed(pages))
