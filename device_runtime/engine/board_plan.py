"""The memory plan that the CUDA engine would start with on a board, computed on any machine.

Weights, workspace and KV pages are those of the engine's own plan. What the engine measures on the
board before it plans, the context and the process, is assumed here (DECISIONS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from device_runtime.backends.cuda.footprint import DeviceFigures, package_survey
from device_runtime.backends.cuda.support import check_model
from device_runtime.backends.kv_format import KvFormat
from device_runtime.backends.memory_plan import (
    CacheRequest,
    MemoryPlan,
    MemorySurvey,
    cache_tokens,
    plan_memory,
)
from device_runtime.errors import DeviceError
from device_runtime.package_format.amounts import MIB
from device_runtime.package_format.boards import Board
from device_runtime.package_format.model_config import ModelConfig

__all__ = ["CacheRequest", "KvFormat", "MemoryPlan", "MemorySurvey"]

CONTEXT_BYTES = 96 * MIB
"""Assumed for libcuda's part of a process, whatever the GPU."""
CONTEXT_SM_BYTES = 4 * MIB
"""Assumed for the context beside that, for each SM: llama.cpp PR 23604 reports 107 MiB with 34 SMs
and 555 MiB with 188, which is 2.9 MiB for each."""
PROCESS_BYTES = 80 * MIB
"""Of Python with engine and chat: 71 MiB measured (x86-64, 32 layers, graphs of four widths)."""
TOKENIZER_TOKEN_BYTES = 800
"""Of the tokenizer for each token of its vocabulary: 780 bytes measured with 151643 of them."""

MAX_KV_SHARE = 0.8
"""v0.2.3's cache_max_entry_count, most of what KV pages are planned with; the rest stays for the
system."""


@dataclass(frozen=True)
class LongestSession:
    """Tokens of the longest conversation that a board holds when it runs alone.

    Attributes:
        board: name of the board.
        int8_tokens: with an online int8 KV cache.
        fp16_tokens: with an fp16 one.
    """

    board: str
    int8_tokens: int
    fp16_tokens: int

    @property
    def text(self) -> str:
        """The same in words."""
        return (
            f"alone a conversation can have {self.int8_tokens} tokens with int8 KV, "
            f"{self.fp16_tokens} with fp16"
        )


def assumed_bytes(model: ModelConfig, board: Board) -> int:
    """Return what context, driver, Python and tokenizer are assumed to take on a board."""
    context = CONTEXT_BYTES + CONTEXT_SM_BYTES * board.num_sms
    return context + PROCESS_BYTES + TOKENIZER_TOKEN_BYTES * model.vocab_size


def board_survey(model: ModelConfig, request: CacheRequest, board: Board) -> MemorySurvey:
    """Return what the CUDA engine would find on a board and need there.

    ``available_bytes`` are the board's usable bytes, ``context_bytes`` the `assumed_bytes`.
    """
    figures = DeviceFigures(
        num_sms=board.num_sms,
        is_integrated=True,
        available_bytes=board.usable_bytes,
        context_bytes=assumed_bytes(model, board),
    )
    return package_survey(model, request, figures)


def plan_on_board(model: ModelConfig, request: CacheRequest, board: Board) -> MemoryPlan:
    """Return the plan of a package on a board.

    Raises:
        OutOfMemoryError: there is no room for a single page.
    """
    return plan_memory(model, request, board_survey(model, request, board))


def fitting_tokens(model: ModelConfig, request: CacheRequest, board: Board) -> int:
    """Return the tokens that the pages asked for hold, as far as they fit; 0 where none does."""
    return cache_tokens(model, request, board_survey(model, request, board))


def single_session(model: ModelConfig, request: CacheRequest) -> CacheRequest:
    """Return a request for one sequence as long as the model takes, in `MAX_KV_SHARE` of memory."""
    return replace(
        request,
        cache_max_entry_count=MAX_KV_SHARE,
        session_len=model.context_tokens,
        max_batch_size=1,
    )


def longest_sessions(
    model: ModelConfig, request: CacheRequest, boards: Sequence[Board]
) -> tuple[LongestSession, ...]:
    """Return how long conversations can be on each board; at most what the model was made for.

    KV pages take `MAX_KV_SHARE` of what is free there. Of ``request`` only page_size and
    max_tokens_per_step count.
    """
    alone = single_session(model, request)
    int8 = replace(alone, kv_format=KvFormat.INT8_ONLINE)
    fp16 = replace(alone, kv_format=KvFormat.FP16)
    return tuple(
        LongestSession(
            board.name,
            min(model.context_tokens, fitting_tokens(model, int8, board)),
            min(model.context_tokens, fitting_tokens(model, fp16, board)),
        )
        for board in boards
    )


def kernels_refusal(model: ModelConfig) -> str:
    """Return why the CUDA engine does not run a model, "" where it does."""
    try:
        check_model(model)
    except DeviceError as error:
        return str(error)
    return ""
