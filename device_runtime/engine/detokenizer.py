"""Tokens to text as they come, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD = 3
"""Bytes of an unfinished UTF-8 character: at most three, each one replacement character."""
_CONTEXT_TOKENS = 6
_WINDOW_TOKENS = 32

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Decodes a growing sequence in a short window of its last tokens.

    The tokens before the answer are part of the window at first, so that a tokenizer that drops
    the blank before the first word of a text does not drop the one after the prompt.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._num_emitted = len(decode(self._window))

    def push(self, token_id: int) -> str:
        """Return the characters that are complete with this token."""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_held = _trailing_replacements(text)
        new = text[self._num_emitted : len(text) - num_held]
        self._num_emitted += len(new)
        if num_held == 0 and len(self._window) > _WINDOW_TOKENS:
            self._window = self._window[-_CONTEXT_TOKENS:]
            self._num_emitted = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        """Return what is left: bytes that never became a character, as U+FFFD."""
        text = self._decode(self._window)
        new = text[self._num_emitted :]
        self._num_emitted = len(text)
        return new


def _trailing_replacements(text: str) -> int:
    """Return how many characters at the end may still change: an unfinished character's bytes."""
    count = 0
    while count < min(MAX_HELD, len(text)) and text[-1 - count] == REPLACEMENT:
        count += 1
    return count
