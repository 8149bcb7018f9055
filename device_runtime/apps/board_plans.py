"""What an engine would take of the memory of boards that are not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from device_runtime.apps.model_facts import Line
from device_runtime.apps.model_plan import memory_text, plan_values
from device_runtime.backends.memory_plan import MemoryPlan
from device_runtime.engine.board_plan import (
    LongestSession,
    kernels_refusal,
    longest_sessions,
    plan_on_board,
)
from device_runtime.engine.configure import cache_request
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import DeviceError
from device_runtime.package_format.boards import Board
from device_runtime.package_format.package import Package


def board_facts(
    package: Package, options: EngineOptions, boards: Sequence[Board]
) -> list[dict[str, object]]:
    """Return each board's plan as JSON values, or why there is none.

    Raises:
        PackageError: the package asks for a KV format that this turbojet does not have.
        UsageError: the session asked for is longer than the model can have.
    """
    facts: list[dict[str, object]] = []
    for board in boards:
        try:
            plan, longest = _plan(package, options, board)
        except DeviceError as error:
            facts.append({"board": board.name, "error": str(error)})
            continue
        tokens = {"int8_tokens": longest.int8_tokens, "fp16_tokens": longest.fp16_tokens}
        facts.append({"board": board.name, **plan_values(plan), **tokens})
    return facts


def board_lines(package: Package, options: EngineOptions, boards: Sequence[Board]) -> list[Line]:
    """Return each board's plan as lines, or why there is none.

    Raises:
        PackageError: the package asks for a KV format that this turbojet does not have.
        UsageError: the session asked for is longer than the model can have.
    """
    lines = []
    for board in boards:
        try:
            plan, longest = _plan(package, options, board)
        except DeviceError as error:
            lines.append(Line(board.name, str(error)))
            continue
        lines.append(Line(board.name, memory_text(plan, context="context and process")))
        lines += [Line("", text) for text in (*plan.notes, longest.text)]
    return lines


def _plan(
    package: Package, options: EngineOptions, board: Board
) -> tuple[MemoryPlan, LongestSession]:
    """Return the plan on a board that has no more memory than the limit asked for.

    Raises:
        DeviceError: the model does not fit, or the kernels do not run it.
    """
    request = cache_request(package, options)
    if refusal := kernels_refusal(package.model):
        raise DeviceError(refusal)
    limit = options.memory_limit_bytes or board.usable_bytes
    board = replace(board, usable_bytes=min(board.usable_bytes, limit))
    (longest,) = longest_sessions(package.model, request, [board])
    return plan_on_board(package.model, request, board), longest
