"""Plans a package for its target boards: what fits, and the values that config.ini gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from device_runtime.errors import UsageError
from device_runtime.package_format.boards import Board
from device_runtime.package_format.config_ini import QUANT_POLICY_ONLINE_INT8, TurboMindConfig
from device_runtime.package_format.kv_page import kv_page_bytes
from device_runtime.package_format.manifest import PlannedMemory
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.tensors import tensor_specs
from host_tools.package_options import ConfigValues

MIB = 1 << 20
WORKSPACE_BYTES = 512 * MIB
"""CUDA context, activations and Python beside weights and KV, the budget of the CUDA engine."""

PAGE_SIZE = 64
MAX_BATCH_SIZE = 8
"""Sequences that one pass of the 4-bit GEMV takes; more would not decode faster on a board."""

SHORT_SESSION = 2048
"""Tokens counted for each sequence of a batch: conversations rarely fill their session."""

MAX_KV_SHARE = 0.8
"""v0.2.3's cache_max_entry_count; the rest stays for the system."""

KV_HEADROOM = 1.5
"""The share covers this many times what is needed: a board's free memory varies."""

SHARE_STEPS = 20

MIN_SESSION = 512
"""A board that cannot hold a conversation of this many tokens is too small for the model."""


@dataclass(frozen=True)
class MemoryNeeds:
    """What a model takes on a device.

    Attributes:
        weight_bytes: all weight files, as they lie in memory.
        page_bytes: one KV page over all layers.
        page_size: tokens of one page.
        quant_policy: KV format the pages are counted for.
    """

    weight_bytes: int
    page_bytes: int
    page_size: int
    quant_policy: int

    @classmethod
    def of(cls, model: ModelConfig, page_size: int, quant_policy: int) -> MemoryNeeds:
        """Return the needs of a model with KV pages of this size and format."""
        specs = tensor_specs(model, has_kv_scales=False)
        return cls(
            weight_bytes=sum(spec.size_bytes for spec in specs),
            page_bytes=kv_page_bytes(model, page_size, quant_policy),
            page_size=page_size,
            quant_policy=quant_policy,
        )

    def pages(self, num_tokens: int) -> int:
        """Return the pages that hold this many tokens."""
        return -(-num_tokens // self.page_size)

    def free_bytes(self, board: Board) -> int:
        """Return what a board has left for KV pages; negative when the weights do not fit."""
        return board.usable_bytes - self.weight_bytes - WORKSPACE_BYTES

    def fitting_tokens(self, board: Board) -> int:
        """Return the tokens whose pages fit in the share of a board that KV may take."""
        pages = int(max(0, self.free_bytes(board)) * MAX_KV_SHARE) // self.page_bytes
        return pages * self.page_size


def choose_boards(
    model_needs: MemoryNeeds, boards: Sequence[Board], *, is_all: bool
) -> tuple[tuple[Board, ...], tuple[str, ...]]:
    """Return the boards that can hold the model, and a sentence for each that cannot.

    Args:
        model_needs: weights and page size.
        boards: the targets asked for.
        is_all: whether all boards were asked for; then those that are too small are left out.

    Raises:
        UsageError: a board that was named is too small, or no board is large enough.
    """
    small = [board for board in boards if model_needs.fitting_tokens(board) < MIN_SESSION]
    sentences = [_too_small(model_needs, board) for board in small]
    if small and (not is_all or len(small) == len(boards)):
        raise UsageError(f"{sentences[-1]}; choose a smaller model or group, or a larger board")
    fitting = tuple(board for board in boards if board not in small)
    return fitting, tuple(f"left out: {sentence}" for sentence in sentences)


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
        The values, and what to tell the person: boards that were left out, and the arithmetic.

    Raises:
        UsageError: the model or the session asked for does not fit on a board.
    """
    page_size = values.cache_block_seq_len or PAGE_SIZE
    policy = QUANT_POLICY_ONLINE_INT8 if values.quant_policy is None else values.quant_policy
    needs = MemoryNeeds.of(model, page_size, policy)
    boards, left_out = choose_boards(needs, boards, is_all=is_all)
    board = min(boards, key=lambda candidate: candidate.usable_bytes)
    fitting = needs.fitting_tokens(board)
    if values.session_len is not None and needs.pages(values.session_len) * page_size > fitting:
        raise UsageError(
            f"session-len {values.session_len} does not fit on {board.name}: "
            f"{arithmetic(needs, board)}, which hold {fitting} tokens; use a shorter one"
        )
    check_session(model, values)
    session_len = values.session_len or min(model.context_tokens, fitting)
    batch = values.max_batch_size or max(
        1, min(MAX_BATCH_SIZE, fitting // min(session_len, SHORT_SESSION))
    )
    tokens = max(session_len, batch * min(session_len, SHORT_SESSION))
    share = _share(needs.pages(tokens) * needs.page_bytes, needs.free_bytes(board))
    planned = replace(
        values,
        quant_policy=policy,
        cache_max_entry_count=values.cache_max_entry_count or share,
        cache_block_seq_len=page_size,
        session_len=session_len,
        max_batch_size=batch,
    )
    sentence = (
        f"plan for {board.name}: {arithmetic(needs, board)}; quant_policy {policy}, session_len "
        f"{session_len}, max_batch_size {batch}, cache_max_entry_count "
        f"{planned.cache_max_entry_count:g}"
    )
    return planned, (*left_out, sentence)


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
    model: ModelConfig, config: TurboMindConfig, boards: Sequence[Board]
) -> tuple[PlannedMemory, ...]:
    """Return the arithmetic for each board with the values that config.ini has.

    A share of the memory and a number of pages both mean what TurboMind v0.2.3 means by them
    (spec section 3.2); ``session_len`` is what the pages then hold.
    """
    values = config.resolved()
    needs = MemoryNeeds.of(model, values.cache_block_seq_len, values.quant_policy)
    plans = []
    for board in boards:
        fitting = max(0, needs.free_bytes(board)) // needs.page_bytes
        count = values.cache_max_entry_count
        pages = (
            int(count) if count >= 1 else int(needs.free_bytes(board) * count) // needs.page_bytes
        )
        pages = min(max(1, pages), fitting)
        plans.append(
            PlannedMemory(
                board=board.name,
                usable_bytes=board.usable_bytes,
                weight_bytes=needs.weight_bytes,
                workspace_bytes=WORKSPACE_BYTES,
                page_bytes=needs.page_bytes,
                num_pages=pages,
                session_len=min(values.session_len, pages * needs.page_size),
                quant_policy=needs.quant_policy,
            )
        )
    return tuple(plans)


def arithmetic(needs: MemoryNeeds, board: Board) -> str:
    """Return how a board's memory is shared out, in one line."""
    return (
        f"{board.usable_bytes // MIB} MiB usable - weights {needs.weight_bytes // MIB} MiB - "
        f"workspace {WORKSPACE_BYTES // MIB} MiB = {needs.free_bytes(board) // MIB} MiB, of which "
        f"{MAX_KV_SHARE:.0%} for KV pages of {needs.page_bytes / MIB:.2f} MiB"
    )


def describe_plan(plan: PlannedMemory, page_size: int) -> str:
    """Return the arithmetic of one board for a person, in one line."""
    kv_bytes = plan.num_pages * plan.page_bytes
    total = plan.weight_bytes + plan.workspace_bytes + kv_bytes
    pages = f"KV {plan.num_pages} pages x {plan.page_bytes / MIB:.2f} MiB"
    return (
        f"{plan.board}: weights {plan.weight_bytes // MIB} MiB + workspace "
        f"{plan.workspace_bytes // MIB} MiB + {pages} = {total // MIB} of "
        f"{plan.usable_bytes // MIB} MiB usable; "
        f"{plan.num_pages * page_size} tokens in all, session_len {plan.session_len}"
    )


def _share(needed_bytes: int, free_bytes: int) -> float:
    """Return the share of the free memory to write, in steps of 0.05 so that it reads well."""
    wanted = needed_bytes * KV_HEADROOM / free_bytes
    return min(MAX_KV_SHARE, math.ceil(wanted * SHARE_STEPS) / SHARE_STEPS)


def _too_small(needs: MemoryNeeds, board: Board) -> str:
    return (
        f"{board.name} is too small: weights {needs.weight_bytes // MIB} MiB + workspace "
        f"{WORKSPACE_BYTES // MIB} MiB leave {needs.free_bytes(board) // MIB} MiB of "
        f"{board.usable_bytes // MIB} MiB usable, KV for {MIN_SESSION} tokens needs "
        f"{needs.pages(MIN_SESSION) * needs.page_bytes // MIB} MiB"
    )
