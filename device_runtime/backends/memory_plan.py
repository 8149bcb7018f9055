"""How memory is shared out, computed before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from device_runtime.backends.kv_format import PAGE_SIZE_MULTIPLE, KvFormat, kv_page_bytes
from device_runtime.errors import OutOfMemoryError, PackageError, UsageError
from device_runtime.package_format.amounts import MIB
from device_runtime.package_format.model_config import ModelConfig


@dataclass(frozen=True)
class CacheRequest:
    """What config.ini and the user ask for.

    Attributes:
        cache_max_entry_count: below 1 a share of what is free once the weights are loaded
            (TurboMind v0.2.2 and later), else a number of pages (spec section 3.2).
        page_size: tokens of a page, ``cache_block_seq_len``.
        session_len: most tokens of one sequence.
        max_batch_size: sequences that run together.
        max_tokens_per_step: tokens of prompts in one step, all sequences together; those that
            decode have one each beside them.
        kv_format: how keys and values are stored.
    """

    cache_max_entry_count: float
    page_size: int
    session_len: int
    max_batch_size: int
    max_tokens_per_step: int
    kv_format: KvFormat

    def __post_init__(self) -> None:
        """Refuse what no plan can serve.

        Raises:
            PackageError: the page size is not made of whole tiles.
            UsageError: a number is not positive.
        """
        if self.page_size < 1 or self.page_size % PAGE_SIZE_MULTIPLE:
            raise PackageError(
                f"cache_block_seq_len is {self.page_size}, "
                f"expected a multiple of {PAGE_SIZE_MULTIPLE}"
            )
        for name in (
            "cache_max_entry_count",
            "session_len",
            "max_batch_size",
            "max_tokens_per_step",
        ):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}, expected more than 0")


@dataclass(frozen=True)
class MemorySurvey:
    """What a backend found on its device and needs there, before it allocates.

    Attributes:
        backend: its name.
        available_bytes: what the process may take, limits included.
        weight_bytes: weights as the backend holds them.
        workspace_bytes: activations, staging and tables.
        context_bytes: what the driver takes for itself.
        num_streamed_layers: last layers that do not stay in memory but are read in every step.
        is_capped_at_use: whether a share of memory stops at the pages that max_batch_size
            sequences of session_len can fill.
        notes: what the backend decided on the way, in words for the user.
    """

    backend: str
    available_bytes: int
    weight_bytes: int
    workspace_bytes: int
    context_bytes: int = 0
    num_streamed_layers: int = 0
    is_capped_at_use: bool = False
    notes: tuple[str, ...] = ()

    @property
    def free_bytes(self) -> int:
        """What is left for KV pages; negative when the rest does not fit."""
        taken = self.weight_bytes + self.workspace_bytes + self.context_bytes
        return self.available_bytes - taken


@dataclass(frozen=True)
class MemoryPlan:
    """The sizes everything is allocated with, and the limits that follow.

    ``weight_bytes + workspace_bytes + context_bytes + kv_bytes <= available_bytes``.
    ``session_len`` tokens fit in ``num_pages`` pages. ``notes`` say what was corrected.
    """

    backend: str
    kv_format: KvFormat
    page_size: int
    page_bytes: int
    num_pages: int
    weight_bytes: int
    workspace_bytes: int
    context_bytes: int
    available_bytes: int
    session_len: int
    max_batch_size: int
    max_tokens_per_step: int
    num_streamed_layers: int = 0
    notes: tuple[str, ...] = ()

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV pages."""
        return self.num_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of everything in the plan."""
        return self.weight_bytes + self.workspace_bytes + self.context_bytes + self.kv_bytes

    @property
    def max_pages_per_sequence(self) -> int:
        """Pages of a sequence of session_len tokens: the width of a page table."""
        return -(-self.session_len // self.page_size)


def plan_memory(model: ModelConfig, request: CacheRequest, survey: MemorySurvey) -> MemoryPlan:
    """Turn what is asked for and what is there into sizes.

    Raises:
        OutOfMemoryError: weights and workspace leave no room for a single page.
    """
    page_bytes = kv_page_bytes(model, request.page_size, request.kv_format)
    fitting = max(0, survey.free_bytes) // page_bytes
    if fitting < 1:
        raise OutOfMemoryError(_shortage(survey, page_bytes))
    notes = list(survey.notes)
    num_pages = _num_pages(request, survey, page_bytes, fitting, notes)
    session_len = request.session_len
    if num_pages * request.page_size < session_len:
        session_len = num_pages * request.page_size
        notes.append(
            f"session_len is cut from {request.session_len} to {session_len} tokens: the KV cache "
            f"holds {num_pages} pages of {request.page_size}"
        )
    return MemoryPlan(
        backend=survey.backend,
        kv_format=request.kv_format,
        page_size=request.page_size,
        page_bytes=page_bytes,
        num_pages=num_pages,
        weight_bytes=survey.weight_bytes,
        workspace_bytes=survey.workspace_bytes,
        context_bytes=survey.context_bytes,
        available_bytes=survey.available_bytes,
        session_len=session_len,
        max_batch_size=request.max_batch_size,
        max_tokens_per_step=request.max_tokens_per_step,
        num_streamed_layers=survey.num_streamed_layers,
        notes=tuple(notes),
    )


def wanted_pages(cache_max_entry_count: float, free_bytes: int, page_bytes: int) -> int:
    """Return the pages that a count or a share asks for (spec section 3.2).

    A count may ask for more than fit, a share for none. TurboMind holds the share as fp32 and
    floors twice.
    """
    if cache_max_entry_count >= 1:
        return int(cache_max_entry_count)
    share_bytes = int(free_bytes * float(np.float32(cache_max_entry_count)))
    return share_bytes // page_bytes


def cache_tokens(model: ModelConfig, request: CacheRequest, survey: MemorySurvey) -> int:
    """Return the tokens that the pages asked for hold, as far as they fit; 0 where none does."""
    page_bytes = kv_page_bytes(model, request.page_size, request.kv_format)
    free_bytes = max(0, survey.free_bytes)
    wanted = wanted_pages(request.cache_max_entry_count, free_bytes, page_bytes)
    return min(wanted, free_bytes // page_bytes) * request.page_size


def _num_pages(
    request: CacheRequest,
    survey: MemorySurvey,
    page_bytes: int,
    fitting: int,
    notes: list[str],
) -> int:
    count = request.cache_max_entry_count
    wanted = wanted_pages(count, survey.free_bytes, page_bytes)
    if count >= 1:
        if wanted > fitting:
            notes.append(
                f"cache_max_entry_count is cut from {wanted} to {fitting} pages of {page_bytes} "
                f"bytes: {survey.free_bytes // MIB} MiB are left for them"
            )
        return min(wanted, fitting)
    if wanted < 1:
        notes.append(
            f"cache_max_entry_count {count} of {survey.free_bytes // MIB} MiB is less than one "
            f"page of {page_bytes} bytes: one page is taken"
        )
        return 1
    num_pages = min(wanted, fitting)
    useful = request.max_batch_size * -(-request.session_len // request.page_size)
    if survey.is_capped_at_use and num_pages > useful:
        return useful
    return num_pages


def _shortage(survey: MemorySurvey, page_bytes: int) -> str:
    parts = (
        ("weights", survey.weight_bytes),
        ("workspace", survey.workspace_bytes),
        ("context", survey.context_bytes),
    )
    taken = " + ".join(f"{name} {size // MIB} MiB" for name, size in parts)
    free, available = survey.free_bytes, survey.available_bytes
    left = f"leave {free // MIB} MiB" if free >= 0 else f"take {(available - free) // MIB} MiB"
    smaller = "model"
    if survey.workspace_bytes > survey.weight_bytes:
        smaller = "session_len or max_batch_size"
    return (
        f"{taken} {left} of {available // MIB} MiB; one KV page needs {page_bytes} bytes, close "
        f"other programs, raise the memory limit or use a smaller {smaller}"
    )
