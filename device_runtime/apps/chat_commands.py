"""The slash commands of the chat: each is one row of the table and one function."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from rich.table import Table
from rich.text import Text

from device_runtime.apps.chat_conversation import Conversation
from device_runtime.apps.chat_settings import SETTABLE, ChatSettings, changed
from device_runtime.apps.chat_status import AnswerFacts, format_context, format_speed
from device_runtime.errors import DeviceError, RequestError, TurbojetError


class ChatState(Protocol):
    """What commands may look at and change."""

    conversation: Conversation
    settings: ChatSettings
    facts: AnswerFacts
    model: str
    is_markdown: bool
    is_leaving: bool

    def say(self, line: str | Text | Table) -> None:
        """Print something of our own, apart from what the model says."""

    def answer(self, text: str) -> None:
        """Send a message and show the answer.

        Raises:
            TurbojetError: there is none; the conversation is as before.
        """

    def toggle_multiline(self) -> bool:
        """Change what Enter does; return whether it now begins a new line."""

    def engine_facts(self) -> list[tuple[str, str]]:
        """Return names and values about the engine for ``/stats``."""


@dataclass(frozen=True)
class Command:
    """One slash command.

    Attributes:
        name: with its slash.
        argument: what may follow, for the help.
        help: one line.
        run: gets the state and the text behind the name, without blanks at its ends.
    """

    name: str
    argument: str
    help: str
    run: Callable[[ChatState, str], None]


def run_command(state: ChatState, line: str) -> None:
    """Obey a line that begins with a slash.

    Raises:
        RequestError: there is no such command, or it cannot do what is asked.
    """
    name, _, argument = line.strip().partition(" ")
    for command in COMMANDS:
        if name == command.name:
            command.run(state, argument.strip())
            return
    raise RequestError(
        f"there is no command {name[:40]}; /help lists them, a blank before the slash sends it"
    )


def _help(state: ChatState, _: str) -> None:
    table = Table.grid(padding=(0, 2))
    for command in COMMANDS:
        words = f"{command.name} {command.argument}".rstrip()
        table.add_row(Text(words, "cyan", no_wrap=True), Text(command.help))
    state.say(table)
    state.say(
        "Enter sends. Alt-Enter, a backslash before Enter, or a message between triple quotes "
        "make several lines. Ctrl-C stops an answer, a second one leaves; so does Ctrl-D."
    )


def _system(state: ChatState, text: str) -> None:
    if text:
        system = {"none": "", "default": None}.get(text, text)
        state.conversation.restore(system, state.conversation.messages)
    shown = state.conversation.system
    if shown:
        state.say(f"system prompt: {shown}")
    else:
        state.say("the model's own system prompt" if shown is None else "no system prompt")


def _reset(state: ChatState, _: str) -> None:
    state.conversation.restore(state.conversation.system, ())
    state.facts = AnswerFacts()
    state.say("the conversation starts anew")


def _retry(state: ChatState, _: str) -> None:
    before = state.conversation.messages
    question = _drop_newest_turn(state)
    try:
        state.answer(question)
    except TurbojetError:
        state.conversation.restore(state.conversation.system, before)
        raise


def _undo(state: ChatState, _: str) -> None:
    question = _drop_newest_turn(state)
    state.say(f"dropped: {question[:60]}")


def _drop_newest_turn(state: ChatState) -> str:
    messages = state.conversation.messages
    if not messages:
        raise RequestError("there is no answer yet")
    state.conversation.restore(state.conversation.system, messages[:-2])
    return messages[-2].content


def _forget(state: ChatState, text: str) -> None:
    messages = state.conversation.messages
    num_turns = len(messages) // 2
    count = int(text) if text.isdecimal() else 0 if text else (num_turns + 1) // 2
    if not 1 <= count <= num_turns:
        raise RequestError(f"/forget takes a number of turns, there are {num_turns}")
    state.conversation.restore(state.conversation.system, messages[2 * count :])
    state.say(f"the oldest {count} of {num_turns} turns are forgotten")


def _save(state: ChatState, text: str) -> None:
    path = Path(text or time.strftime("chat-%Y%m%d-%H%M%S.json")).expanduser()
    if not state.conversation.messages:
        raise RequestError("there is nothing to save yet")
    try:
        state.conversation.save(path)
    except DeviceError as error:  # here the person can act: another folder, another name
        raise RequestError(str(error)) from error
    state.say(f"saved to {path}")


def _load(state: ChatState, text: str) -> None:
    if not text:
        raise RequestError("/load needs the name of a file")
    state.conversation.load(Path(text).expanduser())
    state.facts = AnswerFacts()
    messages = state.conversation.messages
    state.say(f"loaded {len(messages) // 2} turns")
    if messages:
        state.say(f"the last question was: {messages[-2].content}")


def _set(state: ChatState, text: str) -> None:
    name, _, value = text.partition(" ")
    if name:
        state.settings = changed(state.settings, name, value.strip())
    table = Table.grid(padding=(0, 2))
    for field in fields(state.settings):
        if not name or field.name == name:
            shown = _shown(getattr(state.settings, field.name))
            table.add_row(
                Text(field.name, "cyan"), Text(shown), Text(SETTABLE[field.name].help, "dim")
            )
    state.say(table)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return "none" if value is None else str(value)


def _stats(state: ChatState, _: str) -> None:
    facts = state.facts
    rows = [("model", state.model), *state.engine_facts()]
    used, session_len = state.conversation.context_used, state.conversation.session_len
    rows.append(("conversation", format_context(used, session_len)))
    if facts.num_generated:
        rows += [
            ("prompt", f"{facts.num_prompt_tokens} tokens, {facts.num_cached_tokens} cached"),
            ("first token", f"{facts.ttft_s:.2f} s, {format_speed(facts.prefill_tok_s)}"),
            ("answer", f"{facts.num_generated} tokens, {format_speed(facts.decode_tok_s)}"),
        ]
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, "cyan"), Text(value))
    state.say(table)


def _markdown(state: ChatState, _: str) -> None:
    state.is_markdown = not state.is_markdown
    state.say("answers are laid out as Markdown" if state.is_markdown else "answers are plain text")


def _multiline(state: ChatState, _: str) -> None:
    is_on = state.toggle_multiline()
    state.say("Enter begins a new line, Alt-Enter sends" if is_on else "Enter sends")


def _exit(state: ChatState, _: str) -> None:
    state.is_leaving = True


COMMANDS = (
    Command("/help", "", "this list", _help),
    Command("/system", "[TEXT]", "show or set the system prompt; none or default undo it", _system),
    Command("/reset", "", "start anew, with the same system prompt", _reset),
    Command("/retry", "", "answer the last question again", _retry),
    Command("/undo", "", "drop the last question and its answer", _undo),
    Command(
        "/forget", "[N]", "drop the oldest N turns to make room; half of them without N", _forget
    ),
    Command("/save", "[FILE]", "keep the conversation in a file", _save),
    Command("/load", "FILE", "go on with a conversation", _load),
    Command("/set", "[NAME [VALUE]]", "show or change how answers are made", _set),
    Command("/stats", "", "speed, context and memory", _stats),
    Command("/markdown", "", "lay answers out, or show them as they are", _markdown),
    Command("/multiline", "", "let Enter begin a new line, or send", _multiline),
    Command("/exit", "", "leave; /quit and Ctrl-D too", _exit),
    Command("/quit", "", "leave", _exit),
)
