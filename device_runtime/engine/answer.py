"""The text side of one generation: tokens in, outputs out, and when to stop."""

from __future__ import annotations

import time

from device_runtime.engine.configure import StopRules
from device_runtime.engine.detokenizer import Detokenizer
from device_runtime.engine.generation import FinishReason, GenerationParams, Output
from device_runtime.engine.sequence import Sequence
from device_runtime.engine.stop_strings import StopStrings
from device_runtime.engine.tokenizer import Tokenizer


class Answer:
    """Turns the tokens of one sequence into outputs."""

    def __init__(
        self,
        sequence: Sequence,
        params: GenerationParams,
        tokenizer: Tokenizer,
        stop_rules: StopRules,
    ) -> None:
        """Start the clock of one answer.

        Args:
            sequence: what is generated.
            params: of the request.
            tokenizer: to decode.
            stop_rules: what ends the answer beside the request's, unless eos is ignored.
        """
        self.sequence = sequence
        # A special token has no text, so a request that names one means the token.
        asked = {text: tokenizer.special_id(text) for text in params.stop}
        self._stop_ids = frozenset(i for i in asked.values() if i is not None)
        texts = tuple(text for text, token_id in asked.items() if token_id is None)
        if not params.ignore_eos:
            self._stop_ids |= stop_rules.token_ids
            texts += stop_rules.strings
        self._detokenizer = Detokenizer(tokenizer.decode, sequence.token_ids)
        self._stops = StopStrings(texts)
        self._num_generated = 0
        self._started = time.perf_counter()
        self._first = self._last = 0.0

    def take(self, token_id: int) -> Output:
        """Return the output for the next token."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._num_generated += 1
        if token_id in self._stop_ids:
            return self._output(self._flush(), (), "stop", self._stops.found or token_id)
        text = self._stops.push(self._detokenizer.push(token_id))
        if self._stops.found is not None:
            return self._output(text, (token_id,), "stop", self._stops.found)
        if self._num_generated >= self.sequence.max_tokens:
            text += self._flush()
            if self._stops.found is not None:
                return self._output(text, (token_id,), "stop", self._stops.found)
            return self._output(text, (token_id,), "length", None)
        return self._output(text, (token_id,), None, None)

    def cancel(self) -> Output:
        """Return the last output of an answer that nobody wants any more."""
        return self._output(self._flush(), (), "cancelled", None)

    def _flush(self) -> str:
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()

    def _output(
        self,
        text: str,
        token_ids: tuple[int, ...],
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> Output:
        decoding = self._last - self._first
        return Output(
            sequence_id=self.sequence.sequence_id,
            text=text,
            token_ids=token_ids,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=self.sequence.num_prompt_tokens,
            num_cached_tokens=self.sequence.num_cached_tokens,
            num_generated=self._num_generated,
            ttft_s=self._first - self._started if self._first else 0.0,
            decode_tok_s=(self._num_generated - 1) / decoding if decoding > 0 else 0.0,
        )
