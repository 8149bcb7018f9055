"""What goes into a generation and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.errors import RequestError

if TYPE_CHECKING:
    from device_runtime.engine.session import Session

FinishReason = Literal["stop", "length", "cancelled"]
MAX_STOP_STRINGS = 64
DEFAULT_SAMPLING = SamplingParams()


@dataclass(frozen=True)
class GenerationParams:
    """How one answer is made.

    Attributes:
        max_tokens: most tokens to generate; None for as many as session_len leaves.
        sampling: how each is drawn.
        stop: texts that end the answer and are not part of it.
        ignore_eos: go on after the model's eos and stop tokens, as benchmarks do.
    """

    max_tokens: int | None = None
    sampling: SamplingParams = DEFAULT_SAMPLING
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be followed.

        Raises:
            RequestError: max_tokens is not positive, a stop string is empty or there are too many.
        """
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}, expected at least 1")
        if any(not text for text in self.stop):
            raise RequestError("a stop string is empty, expected at least one character")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"{len(self.stop)} stop strings, expected at most {MAX_STOP_STRINGS}"
            )


DEFAULT_PARAMS = GenerationParams()


@dataclass(frozen=True)
class Request:
    """One prompt for `Engine.generate_many`."""

    prompt_ids: tuple[int, ...]
    params: GenerationParams = DEFAULT_PARAMS
    session: Session | None = None


@dataclass(frozen=True)
class Output:
    """What became known of one sequence since its last output.

    Attributes:
        sequence_id: of the generation.
        text: new text, whole characters; may be empty while a character or a stop string is
            undecided.
        token_ids: new tokens; a stop token is not among them.
        finish_reason: None until the last output.
        stop_reason: what ended it with "stop": a token's id or one of the stop strings.
        num_prompt_tokens: of the prompt, cached ones included.
        num_cached_tokens: of the prompt that needed no computing.
        num_generated: tokens generated so far, the ending one included.
        ttft_s: from the request to the first token; 0.0 before it.
        decode_tok_s: tokens per second after the first; 0.0 before the second.
    """

    sequence_id: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated: int
    ttft_s: float
    decode_tok_s: float


def check_prompt(
    token_ids: Sequence[int], num_needed: int, session_len: int, vocab_size: int
) -> None:
    """Refuse a prompt that cannot be computed.

    Args:
        token_ids: of the prompt.
        num_needed: tokens that must fit, the first of the answer included.
        session_len: tokens that do.
        vocab_size: ids the model knows.

    Raises:
        RequestError: the prompt is empty, too long or holds an id outside the vocabulary.
    """
    if not len(token_ids):
        raise RequestError("the prompt has no tokens, expected at least 1")
    if num_needed > session_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens and session_len is {session_len}: "
            "shorten the prompt, start a new conversation or open the package with a larger "
            "session_len"
        )
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"the prompt has the token {token_id}, expected 0 to {vocab_size - 1}"
            )
