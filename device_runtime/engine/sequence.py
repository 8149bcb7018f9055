"""The bookkeeping of one generation, as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.session import Session


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it; changed by the scheduler only.

    Attributes:
        sequence_id: unique in the engine; lower came earlier.
        token_ids: the prompt, then every generated token the host has seen.
        num_prompt_tokens: length of the prompt.
        max_tokens: most tokens to generate.
        sampling: how they are drawn.
        rope_theta: rotary base.
        root: digest before the first page, see `page_pool`.
        session: where the pages go at the end, or None.
        pages: KV pages held.
        digests: of the pages that are registered, from the first on.
        num_planned: tokens whose keys and values the submitted steps write.
        num_computed: the same of the collected steps.
        num_pending: tokens drawn in steps not collected yet.
        num_in_flight: submitted steps not collected yet.
        num_cached_tokens: of the prompt, found in pages at the first admission.
        num_preemptions: how often the pages were taken away.
        is_admitted: whether it ever had pages.
        is_known: whether the backend holds its sampling state.
        is_finished: no more tokens are wanted.
    """

    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    sampling: SamplingParams
    rope_theta: float
    root: bytes
    session: Session | None = None
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    num_planned: int = 0
    num_computed: int = 0
    num_pending: int = 0
    num_in_flight: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    is_admitted: bool = False
    is_known: bool = False
    is_finished: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, those included that are drawn but not seen."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_to_feed(self) -> int:
        """Tokens a step could feed next: 1 in decode, more in prefill, 0 when none is wanted."""
        num_tokens = len(self.token_ids) + self.num_pending
        if self.is_finished or num_tokens - self.num_prompt_tokens >= self.max_tokens:
            return 0
        return num_tokens - self.num_planned


@dataclass(frozen=True)
class Row:
    """A sequence's share of one step: tokens ``start`` to ``end`` of it.

    Attributes:
        sequence: whose tokens.
        start: position of the first one.
        end: one past the last one.
        is_sampled: whether the step draws the token at ``end``.
        is_chained: whether the one token is drawn by a step still outstanding.
        is_new: whether the backend hears of the sequence for the first time.
        num_preemptions: the sequence's when planned; the pages are gone if it has grown.
    """

    sequence: Sequence
    start: int
    end: int
    is_sampled: bool
    is_chained: bool
    is_new: bool
    num_preemptions: int

    @property
    def num_tokens(self) -> int:
        """Tokens fed."""
        return self.end - self.start
