"""The chat around a conversation without a model: commands, answers, leaving."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fake_chat import FakeConversation, make_plan
from rich.console import Console

from device_runtime.apps.chat_commands import COMMANDS
from device_runtime.apps.chat_repl import Repl
from device_runtime.apps.chat_settings import ChatSettings
from device_runtime.apps.chat_status import memory_in_use
from device_runtime.engine.generation import GenerationParams, Output
from device_runtime.errors import DeviceError
from device_runtime.templates.message import Message


class ScriptedReader:
    """Gives messages from a list; an exception in it is raised."""

    is_multiline = False

    def __init__(self, script: Sequence[str | type[BaseException]]) -> None:
        self._script = iter(script)

    def read(self) -> str:
        entry = next(self._script, EOFError)
        if isinstance(entry, str):
            return entry
        raise entry


class Talk:
    """A chat that has run through a script."""

    def __init__(
        self,
        *script: str | type[BaseException],
        conversation: FakeConversation | None = None,
        is_markdown: bool = True,
        width: int = 60,
    ) -> None:
        self.conversation = conversation or FakeConversation()
        self.file = io.StringIO()
        console = Console(
            file=self.file, width=width, height=30, markup=False, emoji=False, highlight=False
        )
        self.repl = Repl(
            conversation=self.conversation,
            model="toy",
            plan=make_plan(),
            settings=ChatSettings(),
            reader=ScriptedReader(script),
            console=console,
            is_markdown=is_markdown,
        )
        self.code = self.repl.run()

    @property
    def output(self) -> str:
        return self.file.getvalue()

    @property
    def contents(self) -> list[str]:
        return [message.content for message in self.conversation.messages]


def test_a_message_is_answered_and_kept() -> None:
    talk = Talk("hello")
    assert talk.contents == ["hello", "hello"]
    assert "hello" in talk.output
    assert talk.code == 0


def test_the_greeting_says_what_was_corrected() -> None:
    assert "session_len is cut from 2048 to 1000 tokens" in Talk().output


def test_blank_messages_are_not_sent() -> None:
    assert Talk("", "  \n").contents == []


def test_control_sequences_of_the_model_do_not_reach_the_screen() -> None:
    talk = Talk("a\x1b]0;evil\x07b\x1b[2Jc")
    assert "abc" in talk.output
    assert "evil" not in talk.output
    # What is kept is what the model said: the conversation goes on from it.
    assert talk.contents[1] == "a\x1b]0;evil\x07b\x1b[2Jc"


def test_a_conversation_that_outgrows_the_context_says_so_and_goes_on() -> None:
    talk = Talk("hello", "long", "after")
    assert "needs 1200 tokens, session_len is 1000" in talk.output
    assert "/forget drops the oldest turns, /reset starts anew" in talk.output
    assert talk.contents == ["hello", "hello", "after", "after"]


def test_an_answer_cut_at_max_tokens_says_so() -> None:
    talk = Talk("/set max_tokens 3", "hello")
    assert "the answer was cut at max_tokens 3" in talk.output
    assert talk.contents == ["hello", "hel"]


def test_an_answer_that_fills_the_context_says_how_to_go_on() -> None:
    conversation = FakeConversation()
    conversation.session_len = 9  # the question has five characters, the answer gets four
    talk = Talk("/set max_tokens none", "hello", conversation=conversation)
    words = " ".join(talk.output.split())
    assert "the answer was cut where the conversation reached session_len 9 tokens" in words
    assert "/forget drops the oldest turns" in words
    assert talk.contents == ["hello", "hell"]


def test_every_command_is_in_the_help() -> None:
    output = Talk("/help").output
    assert [command.name for command in COMMANDS if command.name not in output] == []


def test_unknown_commands_are_not_sent_to_the_model() -> None:
    talk = Talk("/nope", "/set nope 1", " /etc is a folder", "/usr/bin is one")
    assert "there is no command /nope; /help lists them" in talk.output
    assert "there is no setting 'nope'" in talk.output
    assert talk.contents[::2] == [" /etc is a folder", "/usr/bin is one"]


def test_a_system_prompt_is_set_shown_and_removed() -> None:
    talk = Talk("/system", "hello", "/system Be brief.", "/system none", "/system default")
    said = [line for line in talk.output.splitlines() if "system prompt" in line]
    own, none = "the model's own system prompt", "no system prompt"
    assert said == [own, "system prompt: Be brief.", none, own]
    assert talk.contents == ["hello", "hello"]


def test_reset_keeps_only_the_system_prompt() -> None:
    talk = Talk("/system Be brief.", "hello", "/reset")
    assert (talk.conversation.system, talk.contents) == ("Be brief.", [])


def test_retry_answers_the_same_question_with_another_seed() -> None:
    talk = Talk("hello", "/retry")
    assert talk.contents == ["hello", "hello"]
    first, second = talk.conversation.params
    assert first.sampling.seed != second.sampling.seed


def test_a_retry_that_fails_leaves_the_conversation_as_it_was() -> None:
    class Once(FakeConversation):
        def send(self, text: str, params: GenerationParams) -> Iterator[Output]:
            if self.params:
                raise DeviceError("the device is lost")
            return super().send(text, params)

    talk = Talk("hello", "/retry", conversation=Once())
    assert talk.contents == ["hello", "hello"]
    assert "the device is lost; /save keeps the conversation" in talk.output


def test_undo_drops_the_newest_turn_and_forget_the_oldest() -> None:
    assert Talk("a", "b", "/undo").contents == ["a", "a"]
    assert Talk("a", "b", "c", "/forget").contents == ["c", "c"]
    assert Talk("a", "b", "/forget 1").contents == ["b", "b"]
    assert "/forget takes a number of turns, there are 1" in Talk("a", "/forget 2").output
    assert "there is no answer yet" in Talk("/undo", "/retry").output


def test_a_conversation_is_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    assert f"saved to {path}" in Talk("hello", f"/save {path}").output.replace("\n", "")
    talk = Talk(f"/load {path}", "again")
    assert "loaded 1 turns\nthe last question was: hello" in talk.output
    assert talk.contents == ["hello", "hello", "again", "again"]


def test_a_file_that_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[]")
    talk = Talk("hello", f"/load {tmp_path}/bad.json", "/load")
    assert "cannot load" in talk.output
    assert "/load needs the name of a file" in talk.output
    assert talk.contents == ["hello", "hello"]


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    output = Talk("/save", "hello", f"/save {tmp_path}/mine", f"/save {tmp_path}/no/x").output
    words = " ".join(output.split())
    assert "there is nothing to save yet" in words
    assert "exists and is no conversation, give another name" in words
    assert "cannot write" in words
    assert "/save keeps" not in words


def test_save_without_a_name_takes_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Talk("hello", "/save")
    (name,) = os.listdir(tmp_path)
    assert name.startswith("chat-")


def test_settings_are_shown_and_changed() -> None:
    talk = Talk("/set", "/set temperature 0.25", "hello")
    for name in ("temperature", "top_k", "max_tokens", "stop", "seed"):
        assert name in talk.output
    assert talk.conversation.params[0].sampling.temperature == 0.25


def test_stats_tell_speed_context_and_memory() -> None:
    output = Talk("hello", "/stats").output
    assert "context 10/1000 (1%)" in output
    words = " ".join(output.split())
    assert "750.0 MB now; at most 750.0 MB: weights 600.0 MB, KV cache 100.0 MB (fp16)" in words
    assert "5 tokens, 20.0 tok/s" in output
    assert "cuda" in output


def test_the_memory_of_the_reference_backend_is_what_the_process_has() -> None:
    plan = dataclasses.replace(make_plan(), backend="reference")
    # This test runs in Python with numpy: more than 10 MB, and far from the plan's 750.
    assert 10e6 < memory_in_use(plan) < 2e9
    assert memory_in_use(plan) != plan.total_bytes
    assert memory_in_use(make_plan()) == 750_000_000


def test_markdown_and_multiline_are_switched() -> None:
    talk = Talk("**a**", "/markdown", "**b**", "/multiline", "/multiline")
    assert "**a**" not in talk.output.replace("(", "")
    assert "**b**" in talk.output
    assert "Enter begins a new line, Alt-Enter sends" in talk.output


def test_leaving() -> None:
    assert Talk("/exit", "never").contents == []
    assert Talk("/quit").code == 0
    assert Talk(EOFError).code == 0
    assert Talk(KeyboardInterrupt, KeyboardInterrupt).code == 130
    # A message between two of them means that the person is still here.
    assert Talk(KeyboardInterrupt, "hello", KeyboardInterrupt).code == 0


class Interrupted(FakeConversation):
    """Presses Ctrl-C after three characters."""

    def _pieces(self, text: str) -> Iterator[str]:
        for number, char in enumerate(text):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield char


def test_ctrl_c_stops_the_answer_keeps_what_was_said_and_a_second_one_leaves() -> None:
    talk = Talk("hello", KeyboardInterrupt, conversation=Interrupted())
    assert talk.contents == ["hello", "hell"]
    assert "(stopped)" in talk.output
    assert talk.code == 130


def test_the_status_line_fits_the_window() -> None:
    # Sixty columns, the last one stays free.
    status = Talk("hello").repl.prompt_status()
    assert status == "toy · 20.0 tok/s · context 10/1000 (1%) · memory 750.0 MB"
    narrow = Talk("hello", width=50).repl.prompt_status()
    assert narrow == "toy · 20.0 tok/s · context 10/1000 (1%)"


def test_loaded_text_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "evil.json"
    Talk("x", f"/save {path}")
    path.write_text(path.read_text().replace('"x"', '"\\u001b]0;t\\u0007x"'))
    talk = Talk(f"/load {path}")
    assert "the last question was: x" in talk.output
    assert "\x1b]" not in talk.output


def test_messages_hold_only_what_was_said() -> None:
    talk = Talk("hello")
    assert talk.conversation.messages == (Message("user", "hello"), Message("assistant", "hello"))
