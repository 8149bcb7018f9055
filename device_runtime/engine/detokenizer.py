"""Tokens to text as they come, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_TOKENS = 12
"""A character is whole after at most four tokens, one a byte. What still ends in U+FFFD after
this many, a multiple of all sizes of a character, is no character and goes out as it is."""
_CONTEXT_TOKENS = 6
_MAX_CONTEXT_TOKENS = 24
_WINDOW_TOKENS = 16

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Decodes a growing sequence in a short window of its last tokens.

    The tokens before the answer are part of the window at first, so that a tokenizer that drops
    the blank before the first word of a text does not drop the one after the prompt. The window
    starts where a character does: decoders that join byte tokens judge a run of them as a whole.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._whole_ends: list[int] = []
        self._num_emitted = 0
        self._num_held = 0
        self._restart(_context(decode, prompt_ids))

    def push(self, token_id: int) -> str:
        """Return the characters that are complete with this token."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            self._num_held += 1
            if self._num_held < MAX_HELD_TOKENS:
                return ""
            new = text[self._num_emitted :]
            self._restart([])
            return new
        new = text[self._num_emitted :]
        self._num_emitted = len(text)
        self._num_held = 0
        self._whole_ends.append(len(self._window))
        if len(self._window) > _WINDOW_TOKENS:
            start = max(e for e in self._whole_ends if e <= len(self._window) - _CONTEXT_TOKENS)
            self._restart(self._window[start:])
        return new

    def flush(self) -> str:
        """Return what is left: bytes that never became a character, as U+FFFD."""
        text = self._decode(self._window)
        new = text[self._num_emitted :]
        self._num_emitted = len(text)
        return new

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._num_emitted = len(self._decode(window))
        self._num_held = 0
        self._whole_ends = [0, len(window)]


def _context(decode: Decode, prompt_ids: Sequence[int]) -> list[int]:
    """Return the last tokens of the prompt that are whole characters, none where there are none."""
    for count in range(min(_CONTEXT_TOKENS, len(prompt_ids)), _MAX_CONTEXT_TOKENS + 1):
        window = list(prompt_ids[len(prompt_ids) - count :]) if count <= len(prompt_ids) else []
        if REPLACEMENT not in decode(window):
            return window
    return []
