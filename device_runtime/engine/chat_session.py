"""A conversation: messages in, text out, with the pages of earlier turns kept."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from device_runtime.engine.conversation_file import load_conversation, save_conversation
from device_runtime.engine.engine import Engine
from device_runtime.engine.generation import GenerationParams, Output
from device_runtime.errors import RequestError, TurbojetError
from device_runtime.templates.message import Message, joined_text, segments_after


class ChatSession:
    """One conversation with one engine.

    The tokens of earlier turns, the model's own included, stay exactly as they were, so their keys
    and values are used again. Where the chat template rewrites earlier turns the conversation is
    encoded anew. Nothing is ever dropped from it in silence.
    """

    def __init__(self, engine: Engine, *, system: str | None = None) -> None:
        """Start an empty conversation.

        Args:
            engine: answers; it may serve other conversations too.
            system: system message; None for what the template has, "" for none.
        """
        self._engine = engine
        self._session = engine.new_session()
        self._system = system
        self._messages: list[Message] = []
        self._context_ids: list[int] = []
        self._context_text = ""
        with suppress(TurbojetError):  # what is wrong with the template the first message says
            self._prompt("hello")  # compiles the template before anybody waits for an answer

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, without the system message."""
        return tuple(self._messages)

    @property
    def system(self) -> str | None:
        """System message; None for the template's own."""
        return self._system

    @property
    def session_len(self) -> int:
        """Most tokens the conversation can have."""
        return self._engine.session_len

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far, as the model sees them."""
        return len(self._context_ids)

    @property
    def num_turns(self) -> int:
        """Answers so far."""
        return len(self._messages) // 2

    def send(
        self, text: str, params: GenerationParams | None = None
    ) -> Generator[Output, None, None]:
        """Return the answer to a message as it is made.

        When the iterator is exhausted the message and the answer are part of the conversation. An
        answer that is cancelled, or whose iterator is closed early, stays as far as it came; one
        that had no text yet leaves no trace.

        Args:
            text: what the user says.
            params: how to answer; the package's defaults when None.

        Raises:
            RequestError: the conversation does not fit in session_len, or the template refuses
                it; raised at once, and the conversation is as before.
        """
        if self._session.is_busy:
            raise RequestError("an answer is still running, cancel it first")
        params = params or GenerationParams(sampling=self._engine.default_sampling)
        prompt_ids, prompt_text = self._prompt(text)
        if len(prompt_ids) >= self.session_len:
            raise RequestError(
                f"the conversation has {len(prompt_ids)} tokens with this message and session_len "
                f"is {self.session_len}: reset it to start a new one, shorten the message or open "
                "the package with a larger session_len"
            )
        outputs = self._engine.generate(prompt_ids, params, self._session)
        return self._answer(text, prompt_ids, prompt_text, outputs)

    def cancel(self) -> None:
        """Stop the running answer after the step it is in; any thread or signal handler may."""
        if self._session.sequence_id is not None:
            self._engine.cancel(self._session.sequence_id)

    def reset(self, system: str | None = None) -> None:
        """Forget the conversation and give its pages back.

        Args:
            system: the next one's system message.

        Raises:
            RequestError: an answer is running.
        """
        self._engine.close_session(self._session)
        self._system = system
        self._messages = []
        self._context_ids = []
        self._context_text = ""

    def restore(self, system: str | None, messages: Iterable[Message]) -> None:
        """Replace the whole conversation; the pages of what it shares with this one stay in use.

        Args:
            system: system message; None for the template's own, "" for none.
            messages: questions and answers in turn, ending with an answer.

        Raises:
            RequestError: an answer is running, or the template refuses the messages.
        """
        if self._session.is_busy:
            raise RequestError("an answer is still running, cancel it first")
        before = self._system, self._messages
        self._system, self._messages = system, list(messages)
        try:
            if self._messages:
                self._reencode()
            else:
                self.reset(system)
        except RequestError:
            self._system, self._messages = before
            raise

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, whole or not at all.

        Raises:
            RequestError: there is a file of that name that is no conversation.
            DeviceError: the disk is full or fails.
        """
        save_conversation(path, self._system, self._messages)

    def load(self, path: Path) -> None:
        """Take a saved conversation in place of this one.

        Raises:
            RequestError: the file cannot be read or is no conversation; this one stays.
        """
        saved = load_conversation(path)
        self.restore(saved.system, saved.messages)

    def _prompt(self, text: str) -> tuple[list[int], str]:
        """Return ids and text of the prompt with a new message.

        Where the prompt goes on from the last answer, the tokens up to there are kept.
        """
        template = self._engine.template
        segments = template.render([*self._all_messages(), Message("user", text)])
        whole = joined_text(segments)
        tokenizer = self._engine.tokenizer
        if self._context_ids and whole.startswith(self._context_text):
            rest = segments_after(segments, len(self._context_text))
            return self._context_ids + tokenizer.encode_segments(rest, is_start=False), whole
        return tokenizer.encode_prompt(segments, writes_bos=template.writes_bos), whole

    def _answer(
        self,
        text: str,
        prompt_ids: list[int],
        prompt_text: str,
        outputs: Generator[Output, None, None],
    ) -> Generator[Output, None, None]:
        answer_ids: list[int] = []
        answer = ""
        is_first = True
        last: Output | None = None
        try:
            for output in outputs:
                answer_ids.extend(output.token_ids)
                if is_first and output.text:
                    # The blank that SentencePiece puts before a first word is not the model's.
                    output = replace(output, text=output.text.removeprefix(" "))
                    is_first = False
                answer += output.text
                last = output
                yield output
        finally:
            outputs.close()
            is_whole = last is not None and last.finish_reason in ("stop", "length")
            if answer or is_whole:
                self._messages += [Message("user", text), Message("assistant", answer)]
                self._context_ids = prompt_ids + answer_ids
                self._context_text = prompt_text + answer
                if last is not None and isinstance(last.stop_reason, str):
                    self._reencode()  # the last tokens hold the stop string, which is not said

    def _reencode(self) -> None:
        """Encode the conversation again, up to the last answer's end."""
        template = self._engine.template
        segments = template.render(self._all_messages(), add_generation_prompt=False)
        self._context_text = joined_text(segments)
        self._context_ids = self._engine.tokenizer.encode_prompt(
            segments, writes_bos=template.writes_bos
        )

    def _all_messages(self) -> list[Message]:
        system = [] if self._system is None else [Message("system", self._system)]
        return system + self._messages
