"""Speed, context and memory of a chat, as lines for people and as facts for machines."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from device_runtime.backends.memory_plan import MemoryPlan
from device_runtime.engine.generation import FinishReason, Output
from device_runtime.package_format.amounts import format_bytes


@dataclass(frozen=True)
class AnswerFacts:
    """What is known of one answer, finished or not.

    Attributes:
        finish_reason: None while it grows, and when nothing was generated.
        num_prompt_tokens: of the whole conversation as the model read it.
        num_cached_tokens: of them, tokens that needed no computing.
        num_generated: tokens of the answer.
        ttft_s: from the question to the first token.
        decode_tok_s: tokens per second after the first.
    """

    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated: int = 0
    ttft_s: float = 0.0
    decode_tok_s: float = 0.0

    @classmethod
    def of(cls, output: Output) -> AnswerFacts:
        """Take the facts out of the newest output."""
        return cls(
            finish_reason=output.finish_reason,
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            num_generated=output.num_generated,
            ttft_s=output.ttft_s,
            decode_tok_s=output.decode_tok_s,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation so far."""
        return self.num_prompt_tokens + self.num_generated

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens computed per second until the first token; 0.0 before it."""
        computed = self.num_prompt_tokens - self.num_cached_tokens
        return computed / self.ttft_s if self.ttft_s > 0 else 0.0


def memory_in_use(plan: MemoryPlan) -> int:
    """Return the bytes that the chat takes now.

    The reference backend's pages become memory when they are first written, so there the process
    is measured; the CUDA backend takes all of its plan at once.
    """
    if plan.backend != "reference":
        return plan.total_bytes
    try:
        # Second field: resident pages (man 5 proc_pid_statm).
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return plan.total_bytes
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def format_speed(tokens_per_second: float) -> str:
    """Return a speed with three digits at most."""
    digits = 1 if tokens_per_second < 100 else 0
    return f"{tokens_per_second:.{digits}f} tok/s"


def format_context(used: int, session_len: int) -> str:
    """Return how full the context is."""
    return f"context {used}/{session_len} ({100 * used // session_len}%)"


def status_parts(facts: AnswerFacts, used: int, session_len: int, memory_bytes: int) -> list[str]:
    """Return the parts of the status line, the most important first."""
    speed = [format_speed(facts.decode_tok_s)] if facts.decode_tok_s else []
    memory = f"memory {format_bytes(memory_bytes)}"
    return [*speed, format_context(used, session_len), memory]


def fitting_line(parts: Iterable[str], width: int) -> Text:
    """Join parts with dots, leaving out from the end what does not fit."""
    line = Text()
    for part in parts:
        longer = Text(" · ").join([line, Text(part)]) if line else Text(part)
        if longer.cell_len >= width:
            break
        line = longer
    line.stylize("dim")
    return line
