"""Plans a package for its target boards: what fits, and the values that config.ini gets.

The memory of a board is shared out by the plan that the CUDA engine makes there
(`engine.board_plan`); nothing is allocated and no GPU is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from device_runtime.engine.board_plan import (
    MAX_KV_SHARE,
    CacheRequest,
    KvFormat,
    MemorySurvey,
    board_survey,
    fitting_tokens,
    kernels_refusal,
    plan_on_board,
)
from device_runtime.engine.options import DEFAULT_TOKENS_PER_STEP
from device_runtime.errors import UsageError
from device_runtime.package_format.amounts import MIB
from device_runtime.package_format.boards import Board
from device_runtime.package_format.config_ini import QUANT_POLICY_ONLINE_INT8
from device_runtime.package_format.kv_page import kv_page_bytes
from device_runtime.package_format.manifest import PlannedMemory
from device_runtime.package_format.model_config import ModelConfig
from host_tools.package_options import ConfigValues

PAGE_SIZE = 64
MAX_BATCH_SIZE = 8
"""Sequences that one pass of the 4-bit GEMV takes; more would not decode faster on a board."""

SHORT_SESSION = 2048
"""Tokens counted for each sequence of a batch: conversations rarely fill their session."""

KV_HEADROOM = 1.5
"""The share covers this many times what is needed: a board's free memory varies."""

SHARE_STEPS = 20

MIN_SESSION = 512
"""A board that cannot hold a conversation of this many tokens is too small for the model."""


def choose_boards(
    model: ModelConfig, request: CacheRequest, boards: Sequence[Board], *, is_all: bool
) -> tuple[tuple[Board, ...], tuple[str, ...]]:
    """Return the boards that can hold the model, and a sentence for each that cannot.

    Args:
        model: as it is in the workspace.
        request: what the engine will ask for.
        boards: the targets asked for.
        is_all: whether all boards were asked for; then those that are too small are left out.

    Raises:
        UsageError: a board that was named is too small, or no board is large enough.
    """
    widest = replace(request, cache_max_entry_count=MAX_KV_SHARE)
    small = [board for board in boards if fitting_tokens(model, widest, board) < MIN_SESSION]
    sentences = [_too_small(model, request, board) for board in small]
    if small and (not is_all or len(small) == len(boards)):
        raise UsageError(f"{sentences[-1]}; {_remedy(model)}")
    fitting = tuple(board for board in boards if board not in small)
    return fitting, tuple(f"left out: {sentence}" for sentence in sentences)


def fitting_boards(
    model: ModelConfig, boards: Sequence[Board], values: ConfigValues, *, is_all: bool
) -> tuple[tuple[Board, ...], tuple[str, ...]]:
    """Return what `choose_boards` does for a workspace that is yet to be written."""
    short = replace(_request(model, values), session_len=MIN_SESSION, max_batch_size=1)
    return choose_boards(model, short, boards, is_all=is_all)


def plan_config(
    model: ModelConfig, boards: Sequence[Board], values: ConfigValues, *, is_all: bool = False
) -> tuple[ConfigValues, tuple[str, ...]]:
    """Return complete values of config.ini for the target boards, the smallest one ruling.

    What the person gave stays as given, and is refused where the smallest board cannot serve it.

    Args:
        model: as it will be in the workspace.
        boards: the targets asked for.
        values: what the person gave.
        is_all: whether ``boards`` are simply all; those too small are then left out.

    Returns:
        The values, and what to tell the person: boards that were left out, what no board's GPU
        runs, and the arithmetic.

    Raises:
        UsageError: the model, the session or the pages asked for do not fit on a board.
    """
    check_session(model, values)
    request = _request(model, values)
    policy = request.kv_format.value
    boards, left_out = fitting_boards(model, boards, values, is_all=is_all)
    board = min(boards, key=lambda candidate: fitting_tokens(model, request, candidate))
    _check_workspace(model, request, board)
    _check_pages(model, request, board)
    fitting = fitting_tokens(model, request, board)
    if values.session_len is None:
        request = replace(request, session_len=min(request.session_len, fitting))
    elif -(-values.session_len // request.page_size) * request.page_size > fitting:
        raise UsageError(
            f"session-len {values.session_len} does not fit on {board.name}: "
            f"{arithmetic(model, request, board)}, which hold {fitting} tokens; use a shorter one"
        )
    if values.max_batch_size is None:
        request = replace(request, max_batch_size=_batch_size(model, request, board))
    if values.cache_max_entry_count is None:
        request = replace(request, cache_max_entry_count=_share(model, request, board))
    planned = replace(
        values,
        quant_policy=policy,
        cache_max_entry_count=request.cache_max_entry_count,
        cache_block_seq_len=request.page_size,
        session_len=request.session_len,
        max_batch_size=request.max_batch_size,
    )
    sentence = (
        f"plan for {board.name}: {arithmetic(model, request, board)}; quant_policy {policy}, "
        f"session_len {request.session_len}, max_batch_size {request.max_batch_size}, "
        f"cache_max_entry_count {request.cache_max_entry_count:g}"
    )
    refusal = kernels_refusal(model)
    warnings = (f"warning: no board runs this model on its GPU: {refusal}",) if refusal else ()
    return planned, (*left_out, *warnings, sentence)


def check_session(model: ModelConfig, values: ConfigValues) -> None:
    """Refuse a session that would need a sliding window.

    Raises:
        UsageError: the session asked for is longer than the model's window.
    """
    limit = model.sliding_window
    if limit and values.session_len is not None and values.session_len > limit:
        raise UsageError(
            f"session-len is {values.session_len}, the layers of this model look back {limit} "
            "tokens; turbojet runs it up to that"
        )


def plan_boards(
    model: ModelConfig, request: CacheRequest, boards: Sequence[Board]
) -> tuple[PlannedMemory, ...]:
    """Return the plan of each board that `choose_boards` found large enough.

    Args:
        model: as it is in the workspace.
        request: what config.ini asks for.
        boards: the targets.
    """
    plans = []
    for board in boards:
        plan = plan_on_board(model, request, board)
        plans.append(
            PlannedMemory(
                board=board.name,
                usable_bytes=plan.available_bytes,
                weight_bytes=plan.weight_bytes,
                workspace_bytes=plan.workspace_bytes + plan.context_bytes,
                page_bytes=plan.page_bytes,
                num_pages=plan.num_pages,
                session_len=plan.session_len,
                quant_policy=plan.kv_format.value,
            )
        )
    return tuple(plans)


def arithmetic(model: ModelConfig, request: CacheRequest, board: Board) -> str:
    """Return how a board's memory is shared out, in one line."""
    survey = board_survey(model, request, board)
    page_bytes = kv_page_bytes(model, request.page_size, request.kv_format.value)
    count = request.cache_max_entry_count
    part = f"{100 * count:g}% for KV" if count < 1 else f"{int(count)} KV"
    return (
        f"{survey.available_bytes // MIB} MiB usable - {_taken(survey, ' - ')} = "
        f"{survey.free_bytes // MIB} MiB, of which {part} pages of {page_bytes / MIB:.2f} MiB"
    )


def describe_plan(plan: PlannedMemory, page_size: int) -> str:
    """Return the arithmetic of one board for a person, in one line."""
    kv_bytes = plan.num_pages * plan.page_bytes
    total = plan.weight_bytes + plan.workspace_bytes + kv_bytes
    pages = f"KV {plan.num_pages} pages x {plan.page_bytes / MIB:.2f} MiB"
    return (
        f"{plan.board}: weights {plan.weight_bytes // MIB} MiB + workspace and process "
        f"{plan.workspace_bytes // MIB} MiB + {pages} = {total // MIB} of "
        f"{plan.usable_bytes // MIB} MiB usable; "
        f"{plan.num_pages * page_size} tokens in all, session_len {plan.session_len}"
    )


def _request(model: ModelConfig, values: ConfigValues) -> CacheRequest:
    """Return what is asked of the engine before the boards have their say."""
    policy = QUANT_POLICY_ONLINE_INT8 if values.quant_policy is None else values.quant_policy
    return CacheRequest(
        cache_max_entry_count=values.cache_max_entry_count or MAX_KV_SHARE,
        page_size=values.cache_block_seq_len or PAGE_SIZE,
        session_len=values.session_len or model.context_tokens,
        max_batch_size=values.max_batch_size or 1,
        max_tokens_per_step=DEFAULT_TOKENS_PER_STEP,
        kv_format=KvFormat(policy),
    )


def _taken(survey: MemorySurvey, sign: str) -> str:
    parts = (
        ("weights", survey.weight_bytes),
        ("workspace", survey.workspace_bytes),
        ("context and process", survey.context_bytes),
    )
    return sign.join(f"{name} {size // MIB} MiB" for name, size in parts)


def _check_workspace(model: ModelConfig, request: CacheRequest, board: Board) -> None:
    """Refuse sequences whose tables and states alone are more than a board holds."""
    survey = board_survey(model, request, board)
    if survey.free_bytes < 0:
        raise UsageError(
            f"session-len {request.session_len} with max-batch-size {request.max_batch_size} does "
            f"not fit on {board.name}: {_taken(survey, ' + ')} {_left(survey)}; use smaller ones"
        )


def _check_pages(model: ModelConfig, request: CacheRequest, board: Board) -> None:
    """Refuse a number of pages that is more than a board holds, and a share that is not one."""
    count = request.cache_max_entry_count
    pages = fitting_tokens(model, request, board) // request.page_size
    if count >= 1 and int(count) > pages:
        raise UsageError(
            f"cache-max-entry-count {count:g} does not fit on {board.name}: "
            f"{arithmetic(model, request, board)}, and {pages} pages fit; ask for fewer, or for a "
            "share below 1"
        )
    if pages < 1:
        raise UsageError(
            f"cache-max-entry-count {count:g} is less than one KV page on {board.name}: "
            f"{arithmetic(model, request, board)}; ask for more"
        )


def _batch_size(model: ModelConfig, request: CacheRequest, board: Board) -> int:
    """Return how many short conversations fit beside each other, or one long one."""
    short = min(request.session_len, SHORT_SESSION)
    for batch in range(MAX_BATCH_SIZE, 1, -1):
        wanted = max(request.session_len, batch * short)
        if fitting_tokens(model, replace(request, max_batch_size=batch), board) >= wanted:
            return batch
    return 1


def _share(model: ModelConfig, request: CacheRequest, board: Board) -> float:
    """Return the share of the free memory to write, in steps of 0.05 so that it reads well."""
    short = min(request.session_len, SHORT_SESSION)
    tokens = max(request.session_len, request.max_batch_size * short)
    page_bytes = kv_page_bytes(model, request.page_size, request.kv_format.value)
    needed = -(-tokens // request.page_size) * page_bytes
    wanted = needed * KV_HEADROOM / board_survey(model, request, board).free_bytes
    return min(MAX_KV_SHARE, math.ceil(wanted * SHARE_STEPS) / SHARE_STEPS)


def _too_small(model: ModelConfig, request: CacheRequest, board: Board) -> str:
    survey = board_survey(model, request, board)
    page_bytes = kv_page_bytes(model, request.page_size, request.kv_format.value)
    needed = -(-MIN_SESSION // request.page_size) * page_bytes
    share = f", {MAX_KV_SHARE:.0%} of it for KV" if survey.free_bytes > 0 else ""
    return (
        f"{board.name} is too small: {_taken(survey, ' + ')} {_left(survey)}{share}, and "
        f"{MIN_SESSION} tokens of KV need {-(-needed // MIB)} MiB"
    )


def _left(survey: MemorySurvey) -> str:
    free, available = survey.free_bytes, survey.available_bytes
    left = f"leave {free // MIB}" if free >= 0 else f"take {(available - free) // MIB}"
    return f"{left} MiB of {available // MIB} MiB usable"


def _remedy(model: ModelConfig) -> str:
    """Return what to do where a model does not fit."""
    if model.head_type == "int8" or model.tie_word_embeddings:
        return "choose a smaller model or a larger board"
    saved = model.vocab_size * (model.hidden_size - 2)
    return f"--head int8 takes {saved // MIB} MiB less; or choose a smaller model or a larger board"
