"""The chat in a real terminal: a pseudo terminal of 80 columns, keys in, cells out."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import Terminal
from tiny_package import make_package

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 20.0
CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"


class Window:
    """A program in a terminal, driven by keys."""

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        self.terminal = Terminal(80, 24)
        self.raw = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._controller, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(HERE.parents[1]),
                "PYTHONUTF8": "1",
                "TERM": "xterm-256color",
                **environ,
            },
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)

    def press(self, keys: str) -> None:
        os.write(self._controller, keys.encode())

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_there():
            assert self._read() and time.monotonic() < deadline, "\n".join(self.terminal.lines)

    def wait_for_text(self, text: str, count: int = 1) -> None:
        self.wait_for(lambda: "\n".join(self.terminal.lines).count(text) >= count)

    def wait_for_prompt(self) -> None:
        """Wait until an empty prompt is the last thing above the toolbar."""

        def is_there() -> bool:
            return self.terminal.screen[self.terminal.row] == ">>>"

        self.wait_for(is_there)

    def finish(self) -> int:
        while self._read():
            pass
        return self.process.wait(TIMEOUT_S)

    def _read(self) -> bool:
        """Take in what the program wrote; False when it has ended."""
        if not select.select([self._controller], [], [], TIMEOUT_S)[0]:
            return False
        try:
            data = os.read(self._controller, 1 << 16)
        except OSError:
            return False
        text = self._decoder.decode(data)
        self.raw += text
        self.terminal.write(text)
        for reply in self.terminal.replies:
            self.press(reply)
        self.terminal.replies.clear()
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._controller)


Opener = Callable[..., Window]


@pytest.fixture
def open_window(tmp_path: Path) -> Iterator[Opener]:
    windows: list[Window] = []

    def opener(
        delay_s: float = 0.0,
        kind: str = "prompt",
        command: list[str] | None = None,
        **environ: str,
    ) -> Window:
        fake = [str(HERE / "fake_chat.py"), str(tmp_path / "history"), str(delay_s), kind]
        windows.append(Window(command or fake, environ))
        return windows[-1]

    yield opener
    for window in windows:
        window.close()


def test_a_message_is_typed_edited_answered_and_remembered(open_window: Opener) -> None:
    window = open_window()
    window.wait_for_prompt()
    window.press("helxo\x1b[D\x7fl\r")  # left, backspace
    window.wait_for_text("hello", 2)
    window.wait_for_prompt()
    window.press("\x1b[A")  # up brings it back
    window.wait_for_text(">>> hello", 2)
    window.press(CTRL_C + CTRL_D)
    assert window.finish() == 0
    assert "assistant: 'hello'" in window.terminal.lines

    again = open_window()
    again.wait_for_prompt()
    again.press("\x1b[A")
    again.wait_for_text(">>> hello")


def test_chinese_is_typed_answered_and_wrapped(open_window: Opener) -> None:
    window = open_window()
    window.wait_for_prompt()
    sentence = "大型语言模型可以在小型设备上运行" * 3  # 48 characters, 96 columns
    window.press(sentence + "\r")
    window.wait_for_text("行大", 1)
    window.wait_for_prompt()
    window.press(CTRL_D)
    assert window.finish() == 0
    assert f"assistant: '{sentence[:40]}'" in "".join(window.terminal.lines)
    # Eighty columns hold forty wide characters.
    assert sentence[:40] in window.terminal.lines
    assert sentence[40:] in window.terminal.lines


def test_several_lines_make_one_message(open_window: Opener) -> None:
    window = open_window()
    window.wait_for_prompt()
    window.press("a\\\rb" + ALT_ENTER + "c\r")
    window.wait_for_text("... c")
    window.wait_for_prompt()
    window.press('"""\rx\r"""\r')
    window.wait_for_prompt()
    window.press("\x1b[200~p\rq\x1b[201~")  # a bracketed paste with a newline does not send
    window.wait_for_text("... q")
    window.press("\r")
    window.wait_for_prompt()
    window.press(CTRL_D)
    window.finish()
    lines = window.terminal.lines
    assert [line for line in lines if line.startswith("user")] == [
        "user: 'a\\nb\\nc'",
        "user: 'x'",
        "user: 'p\\nq'",
    ]


def test_markdown_taller_than_the_screen_appears_once_and_in_order(
    open_window: Opener, tmp_path: Path
) -> None:
    numbers = [f"number {i}" for i in range(60)]
    source = "# Title\n\n```python\n" + "\n".join(f"x = {i}" for i in range(60)) + "\n```\n\n"
    source += "\n".join(f"- {number}" for number in numbers) + "\n\n中文**结尾**"
    (tmp_path / "long.md").write_text(source, encoding="utf-8")
    window = open_window(delay_s=0.0002)
    window.wait_for_prompt()
    window.press(f"/set max_tokens none\rsay {tmp_path}/long.md\r")
    window.wait_for_text("中文结尾")
    window.wait_for_prompt()
    lines = window.terminal.lines
    assert [line for line in lines if line.startswith("x = ")] == [f"x = {i}" for i in range(60)]
    assert [line[2:] for line in lines if line.startswith("•")] == numbers
    assert lines.count("Title") == 1
    window.press(CTRL_D)
    assert window.finish() == 0


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(open_window: Opener) -> None:
    window = open_window(delay_s=0.005)
    window.wait_for_prompt()
    window.press("count\r")
    window.wait_for_text("1 2 3 4 5 6 7 8")
    assert "Ctrl-C stops" in "\n".join(window.terminal.screen)
    window.press("typed ahead" + CTRL_C)
    window.wait_for_text("(stopped)")
    window.wait_for_prompt()
    window.press(CTRL_C)
    assert window.finish() == 130
    lines = window.terminal.lines
    assert any(line.startswith("assistant: '1 2 3 4 5 6 7 8") for line in lines)
    assert not any("tok/s · context" in line for line in lines)
    assert not any("typed ahead" in line for line in lines)


def test_ctrl_c_at_the_prompt_clears_the_line_and_asks_before_leaving(open_window: Opener) -> None:
    window = open_window()
    window.wait_for_prompt()
    window.press("half a thought" + CTRL_C)
    window.wait_for_prompt()
    window.press(CTRL_C)
    window.wait_for_text("Ctrl-C again leaves")
    window.wait_for_prompt()
    window.press(CTRL_C)
    assert window.finish() == 130


def test_a_terminal_without_cursor_movement_gets_plain_lines(open_window: Opener) -> None:
    window = open_window(kind="plain", TERM="dumb")
    window.wait_for_text(">>>")
    window.press("hello\n")
    window.wait_for_text("hello", 2)
    window.wait_for_text(">>>", 2)
    window.press("**a**\\\nb\n")
    window.wait_for_text(">>>", 3)
    window.press(CTRL_D)
    assert window.finish() == 0
    assert "\x1b" not in window.raw
    assert "user: '**a**\\nb'" in window.terminal.lines


def test_without_colours_there_are_none(open_window: Opener) -> None:
    window = open_window(NO_COLOR="1")
    window.wait_for_prompt()
    window.press("`code`\r")
    window.wait_for_text("code", 2)
    window.wait_for_prompt()
    window.press(CTRL_D)
    window.finish()
    colours = [f"\x1b[{number}" for number in (*range(30, 38), *range(90, 98))]
    assert [colour for colour in colours if f"{colour}m" in window.raw] == []


def test_the_terminal_is_as_before_when_the_chat_ends(open_window: Opener) -> None:
    window = open_window(delay_s=0.01)
    window.wait_for_prompt()
    window.press("count\r")
    window.wait_for_text("1 2 3")
    os.kill(window.process.pid, signal.SIGINT)
    window.wait_for_text("(stopped)")
    window.wait_for_prompt()
    window.press(CTRL_D)
    assert window.finish() == 0
    assert window.terminal.is_cursor_visible
    assert window.terminal.is_wrapping


def test_what_ends_a_chat_from_outside_leaves_the_terminal_and_the_conversation(
    open_window: Opener, tmp_path: Path
) -> None:
    package = make_package(tmp_path / "tiny").root
    data = tmp_path / "data"
    command = ["-m", "device_runtime.cli", "chat", str(package), "--max-tokens=none", "--seed=1"]
    window = open_window(command=command, TURBOJET_DATA_DIR=str(data))
    window.wait_for_prompt()
    window.press("hello\r")
    window.wait_for_text("tokens ·")
    os.kill(window.process.pid, signal.SIGTERM)
    os.kill(window.process.pid, signal.SIGHUP)
    assert window.finish() == 130
    local_flags = termios.tcgetattr(window._controller)[3]
    assert local_flags & termios.ECHO
    assert local_flags & termios.ICANON
    (kept,) = data.glob("chat_cut_off-*.json")
    assert kept.stat().st_mode & 0o777 == 0o600
    messages = json.loads(kept.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]

    window = open_window(command=command, TURBOJET_DATA_DIR=str(data))
    window.wait_for_text("a conversation was cut off")
    window.wait_for_prompt()
    os.kill(window.process.pid, signal.SIGHUP)
    assert window.finish() == 130
    (told,) = data.glob("chat_cut_off*.json")  # nothing new was said
    assert told != kept
    assert json.loads(told.read_text())["messages"] == messages


def test_the_command_talks_to_a_package_and_keeps_its_history(
    open_window: Opener, tmp_path: Path
) -> None:
    package = make_package(tmp_path / "tiny").root
    command = ["-m", "device_runtime.cli", "chat", str(package), "--max-tokens=8", "--seed=1"]
    window = open_window(command=command, TURBOJET_DATA_DIR=str(tmp_path / "data"))
    window.wait_for_text("tiny · reference engine")
    window.wait_for_prompt()
    window.press("hello\r")
    window.wait_for_text("the answer was cut at max_tokens 8")
    window.wait_for_prompt()
    window.press(f"/save {tmp_path}/talk.json\r")
    window.wait_for_text("saved to")
    window.press("hello " * 200 + "\r")
    window.wait_for_text("/forget drops the oldest turns")
    window.wait_for_prompt()
    window.press("/exit\r")
    assert window.finish() == 0
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    history = tmp_path / "data/chat_history"
    assert "+hello" in history.read_text("utf-8").splitlines()
    assert history.stat().st_mode & 0o777 == 0o600
