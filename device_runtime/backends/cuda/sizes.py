"""The limits of steps, from what is asked for or from the plan, and the sizes of host buffers."""

from __future__ import annotations

from device_runtime.backends.cuda.workspace import StepLimits
from device_runtime.backends.memory_plan import CacheRequest, MemoryPlan
from device_runtime.kernels.reference.kv_pages import KvLayout
from device_runtime.package_format.model_config import ModelConfig

MAX_STEPS_AHEAD = 3
"""Steps on their way while the host looks at the tokens of an earlier one."""
STEPS_IN_FLIGHT = MAX_STEPS_AHEAD + 2
"""Steps whose state and uploads must not be overwritten: those ahead, the one that the host looks
at and the one that it prepares."""
STAGING_BYTES = 8 << 20
"""Of each of the two buffers that weights go through."""
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Sequences that a decode graph is built for."""


def decode_widths(max_batch_size: int) -> tuple[int, ...]:
    """Return the widths that a backend builds graphs for; the last one holds the batch."""
    smaller = [width for width in WIDTHS if width < max_batch_size]
    return (*smaller, next((width for width in WIDTHS if width >= max_batch_size), max_batch_size))


def step_limits(model: ModelConfig, asked: CacheRequest | MemoryPlan, num_sms: int) -> StepLimits:
    """Return the limits of a request, or those of the plan that came of it."""
    return StepLimits(
        model=model,
        layout=KvLayout(asked.kv_format.value, model.head_dim, asked.page_size),
        width=decode_widths(asked.max_batch_size)[-1],
        # Every step may end all sequences and start as many others.
        num_slots=decode_widths(asked.max_batch_size)[-1] * STEPS_IN_FLIGHT,
        max_tokens=asked.max_tokens_per_step,
        max_pages=-(-asked.session_len // asked.page_size),
        num_sms=num_sms,
    )


def upload_bytes(limits: StepLimits) -> int:
    """Return the bytes of small arrays that one step may send: tokens, and every row new."""
    tokens = 20 * limits.rows + 8 * (limits.max_tiles + limits.max_spans)
    a_row = 8 * limits.max_pages + 8 * limits.model.head_dim + 256
    return tokens + limits.width * a_row + 4096
