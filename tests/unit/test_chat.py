"""`turbojet chat` with a tiny package: modes, options, one answer as text and as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from archive_samples import archive_of
from fake_chat import FakeConversation
from tiny_package import make_package

from device_runtime import cli
from device_runtime.apps import end_signals
from device_runtime.apps.chat_input import PlainReader, open_history
from device_runtime.apps.chat_kept import keep_conversation, take_notice
from device_runtime.apps.chat_view import make_console
from device_runtime.engine.chat_session import ChatSession
from device_runtime.engine.conversation_file import load_conversation
from device_runtime.engine.engine import Engine
from device_runtime.engine.generation import GenerationParams, Output
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import RequestError
from device_runtime.templates.message import Message

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("package") / "tiny").root


class Terminal(io.TextIOWrapper):
    """Standard input or output that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def pipe(data: bytes = b"") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def chat(
    monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str | Path], stdin: io.TextIOWrapper
) -> int:
    monkeypatch.setattr(sys, "stdin", stdin)
    return cli.main(["chat", *map(str, arguments)])


def test_a_prompt_is_answered_as_text_and_as_json_alike(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [tiny, "--prompt", "hello", "--seed", "7", "--max-tokens", "12"]
    assert chat(monkeypatch, [*options, "--json"], pipe()) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["backend"], facts["seed"]) == ("tiny", "reference", 7)
    assert facts["finish_reason"] in ("stop", "length")
    assert 0 < facts["num_generated_tokens"] <= 12
    assert facts["num_prompt_tokens"] > len("hello")
    assert facts["ttft_s"] > 0
    assert facts["prefill_tok_s"] > 0

    assert chat(monkeypatch, options, pipe()) == 0
    shown = capsys.readouterr()
    kept = "".join(char for char in facts["text"] if char >= " " or char in "\n\t")
    assert shown.out.rstrip("\n") == kept.rstrip("\n")
    assert shown.out.endswith("\n")
    if facts["finish_reason"] == "length":
        assert "the answer was cut at max_tokens 12" in shown.err


def test_what_the_locale_has_no_character_for_is_an_escape(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [tiny, "--prompt", "hello", "--seed", "3", "--max-tokens", "30"]
    assert chat(monkeypatch, [*options, "--json"], pipe()) == 0
    said = json.loads(capsys.readouterr().out)["text"]
    kept = "".join(char for char in said if char.isprintable())
    assert not kept.isascii()  # half characters, as a model of random weights says them
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert chat(monkeypatch, options, pipe()) == 0
    shown = stdout.buffer.getvalue()
    assert kept.encode("ascii", "backslashreplace")[:4] == shown[:4]
    assert rb"\ufffd" in shown


def test_a_history_that_cannot_be_written_ends_no_conversation(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history = open_history(path)
    history.append_string("one")
    path.rename(tmp_path / "before")
    path.mkdir()  # as a full disk: what is written raises
    history.append_string("two")
    assert history.get_strings() == ["one", "two"]
    assert "+one" in (tmp_path / "before").read_text()


def test_bytes_that_are_no_utf8_are_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "caf\udce9 \u4f60")
    assert PlainReader().read() == "caf? \u4f60"


def test_all_of_a_pipe_is_one_prompt(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [tiny, "--json", "--temperature", "0", "--max-tokens", "4"]
    assert chat(monkeypatch, options, pipe("你好\nand more\r\n".encode())) == 0
    piped = json.loads(capsys.readouterr().out)
    assert chat(monkeypatch, [*options, "--prompt", "你好\nand more"], pipe(b"ignored")) == 0
    given = json.loads(capsys.readouterr().out)
    for name in ("text", "num_prompt_tokens", "num_generated_tokens"):
        assert piped[name] == given[name]


def test_the_system_prompt_reaches_the_model(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for system in ([], ["--system", "Be brief."]):
        options = [tiny, "--json", "--prompt", "x", "--max-tokens", "1", *system]
        assert chat(monkeypatch, options, pipe()) == 0
        counts.append(json.loads(capsys.readouterr().out)["num_prompt_tokens"])
    assert counts[1] > counts[0] + len("Be brief.") // 2


def test_a_saved_conversation_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Engine.open(tiny) as engine:
        session = ChatSession(engine, system="Be brief.")
        list(session.send("hello", GenerationParams(max_tokens=5)))
        session.save(tmp_path / "talk.json")
    options = [tiny, "--load", tmp_path / "talk.json", "--prompt", "x", "--max-tokens=1", "--json"]
    assert chat(monkeypatch, options, pipe()) == 0
    long = json.loads(capsys.readouterr().out)["num_prompt_tokens"]
    assert chat(monkeypatch, [*options, "--system", ""], pipe()) == 0
    assert json.loads(capsys.readouterr().out)["num_prompt_tokens"] < long


@pytest.mark.parametrize(
    ("arguments", "data", "code", "message"),
    [
        (["--prompt", "  "], b"", 2, "the prompt is empty, give --prompt TEXT, or pipe it in"),
        ([], b"\n\n", 2, "the prompt is empty"),
        ([], b"abc\xff", 2, "standard input is not UTF-8 at byte 3"),
        ([], b"x" * ((16 << 20) + 1), 2, "standard input has more than 16777216 bytes"),
        (["--prompt", "x", "--top-k", "many"], b"", 2, "--top-k is 'many', expected a whole"),
        (["--prompt", "x", "--backend", "fast"], b"", 2, "--backend is 'fast', expected one of"),
        (["--prompt", "ab\udcff"], b"", 2, "--prompt is not UTF-8 at byte 2"),
        (["--system", "\udcff", "--prompt", "x"], b"", 2, "--system is not UTF-8 at byte 0"),
        (["--prompt", "x y " * 400], b"", 5, "session_len is 512"),
        (
            ["--prompt", "x", "--load", "/nowhere.json"],
            b"",
            5,
            "cannot load /nowhere.json: No such",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    data: bytes,
    code: int,
    message: str,
) -> None:
    assert chat(monkeypatch, [tiny, *arguments], pipe(data)) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("turbojet: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_a_terminal_needs_both_ends(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, [tiny, "--json"], Terminal(io.BytesIO())) == 2
    assert "--json answers one prompt" in capsys.readouterr().err
    assert chat(monkeypatch, [tiny], Terminal(io.BytesIO())) == 2
    assert "standard output is no terminal" in capsys.readouterr().err


def test_what_was_said_is_kept_whatever_ends_the_chat(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or 1 // 0)
    monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), encoding="utf-8"))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("TURBOJET_DATA_DIR", str(tmp_path / "data"))
    assert chat(monkeypatch, [tiny, "--max-tokens", "4"], Terminal(io.BytesIO())) == 1
    assert "internal error, ZeroDivisionError" in capsys.readouterr().err
    (kept,) = (tmp_path / "data").glob("chat_cut_off-*.json")
    messages = json.loads(kept.read_text("utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_a_signal_that_comes_while_a_conversation_is_kept_does_not_end_that(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost connection: the input ends first, then the shell tells of it, then the kernel."""
    terminal, typed = Terminal(io.BytesIO()), iter(["hello"])

    def read(prompt: str) -> str:
        for text in typed:
            return text
        monkeypatch.setattr(terminal, "isatty", lambda: False)
        raise EOFError

    def hang_up(descriptor: int) -> None:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("os.fsync", hang_up)
        monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), encoding="utf-8"))
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setenv("TURBOJET_DATA_DIR", str(tmp_path / "data"))
        assert chat(monkeypatch, [tiny, "--max-tokens", "4"], terminal) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    (kept,) = (tmp_path / "data").glob("chat_cut_off-*.json")
    assert load_conversation(kept).messages[0].content == "hello"


def test_a_stray_byte_on_a_plain_terminal_is_a_question_mark(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = tmp_path / "talk.json"
    typed = Terminal(io.BytesIO(b"caf\xe9\n/save %b\n" % bytes(talk)), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), encoding="utf-8"))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("TURBOJET_DATA_DIR", str(tmp_path / "data"))
    assert chat(monkeypatch, [tiny, "--max-tokens", "1"], typed) == 0
    assert json.loads(talk.read_text("utf-8"))["messages"][0]["content"] == "caf?"


def test_all_that_was_cut_off_at_once_is_kept_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(process_id: int, text: str) -> None:
        monkeypatch.setattr("os.getpid", lambda: process_id)
        conversation = FakeConversation()
        conversation.restore(None, [Message("user", text), Message("assistant", text)])
        keep_conversation(conversation, tmp_path)

    def told() -> list[str]:
        return [load_conversation(path).messages[0].content for path in take_notice(tmp_path)]

    assert told() == []
    cut_off(11, "one")
    cut_off(22, "two")
    assert told() == ["one", "two"]
    assert told() == []
    assert len(list(tmp_path.iterdir())) == 2
    cut_off(33, "three")
    assert told() == ["three"]
    assert len(list(tmp_path.iterdir())) == 1


def test_an_end_that_got_lost_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a handler raises inside a finalizer, or an event loop keeps what is raised."""
    monkeypatch.setattr(end_signals, "AGAIN_S", 0.05)

    def act() -> None:
        raise SystemExit(130)

    with pytest.raises(SystemExit), end_signals.on_end(act):
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(20)
        raise AssertionError("nobody tried again")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_second_signal_does_not_break_off_what_the_first_began() -> None:
    seen = []
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), end_signals.interruptible():
            try:
                signal.raise_signal(signal.SIGHUP)
            finally:
                signal.raise_signal(signal.SIGHUP)
                signal.raise_signal(signal.SIGTERM)
                seen.append("cleaned up")
        assert seen == ["cleaned up"]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_without_columns_has_eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    assert make_console().width == 80
    monkeypatch.setenv("COLUMNS", "40")
    assert make_console().width == 40


def test_the_environment_sets_options(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURBOJET_MAX_TOKENS", "2")
    monkeypatch.setenv("TURBOJET_SEED", "11")
    assert chat(monkeypatch, [tiny, "--json", "--prompt", "x"], pipe()) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["seed"], facts["num_generated_tokens"] <= 2) == (11, True)
    monkeypatch.setenv("TURBOJET_SESSION_LEN", "-1")
    assert chat(monkeypatch, [tiny, "--json", "--prompt", "x"], pipe()) == 2
    assert "TURBOJET_SESSION_LEN is '-1', expected a whole number" in capsys.readouterr().err
    monkeypatch.delenv("TURBOJET_SESSION_LEN")
    for wrong, right in (("SESSIONLEN", "SESSION_LEN"), ("TOPK", "TOP_K")):
        with monkeypatch.context() as patch:
            patch.setenv(f"TURBOJET_{wrong}", "5")
            assert chat(monkeypatch, [tiny, "--json", "--prompt", "x"], pipe()) == 2
        message = f"TURBOJET_{wrong} is not known; did you mean TURBOJET_{right}"
        assert message in capsys.readouterr().err


def test_an_archive_is_installed_once_and_talked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = make_package(tmp_path / "tiny", is_sealed=True).root
    archive = tmp_path / "tiny.tgz"
    archive_of(package, archive)
    monkeypatch.setenv("TURBOJET_DATA_DIR", str(tmp_path / "data"))
    options = ["--prompt", "hello", "--seed", "7", "--max-tokens", "4", "--json"]
    answers = []
    for target, told in ((archive, "installed tiny release "), (archive, ""), ("tiny", "")):
        assert chat(monkeypatch, [target, *options], pipe()) == 0
        shown = capsys.readouterr()
        answers.append(json.loads(shown.out)["text"])
        assert shown.err.startswith(told)
        assert bool(shown.err) == bool(told)
    assert len(set(answers)) == 1
    archive.write_bytes(archive.read_bytes()[:-100])
    assert chat(monkeypatch, [archive, *options], pipe()) == 3
    assert "the archive is cut short" in capsys.readouterr().err


def test_no_model_and_several_models_are_told_apart(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURBOJET_DATA_DIR", str(tmp_path))
    assert chat(monkeypatch, ["--prompt", "x"], pipe()) == 2
    assert "no model is installed; `turbojet install X.tgz` installs one" in capsys.readouterr().err


def test_an_answer_is_stopped_while_the_question_is_still_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.open(tiny, EngineOptions(max_tokens_per_step=8)) as engine:
        session = ChatSession(engine)
        step = engine.step

        def step_and_cancel() -> list[Output]:
            session.cancel()
            return step()

        monkeypatch.setattr(engine, "step", step_and_cancel)
        outputs = list(session.send("a question of many more tokens than eight"))
        assert [output.finish_reason for output in outputs] == ["cancelled"]
        assert (session.messages, session.context_used) == ((), 0)
        engine.check_integrity()


def test_a_restored_conversation_reuses_what_it_shares_with_the_one_before(tiny: Path) -> None:
    with Engine.open(tiny) as engine:
        session = ChatSession(engine)
        params = GenerationParams(max_tokens=5)
        question = "0123456789" * 10  # a token each
        for text in (question, "second"):
            list(session.send(text, params))
        session.restore(None, session.messages[:2])
        assert [message.content for message in session.messages][::2] == [question]
        last = list(session.send("other", params))[-1]
        assert last.num_cached_tokens >= 64  # the question fills the first page
        session.restore("", ())
        assert (session.system, session.messages, session.context_used) == ("", (), 0)
        engine.check_integrity()


def test_a_conversation_cannot_be_replaced_while_an_answer_runs(tiny: Path) -> None:
    with Engine.open(tiny) as engine:
        session = ChatSession(engine)
        outputs = session.send("hello")
        next(outputs)
        with pytest.raises(RequestError, match="an answer is still running, cancel it first"):
            session.restore(None, ())
        outputs.close()
        session.restore(None, ())


def test_ctrl_c_ends_a_plain_answer_with_130(tiny: Path) -> None:
    code = "import sys; from device_runtime.cli import main; sys.exit(main())"
    arguments = ["chat", str(tiny), "--prompt", "hello", "--max-tokens", "none", "--seed", "3"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW + code, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)  # the answer has begun
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out.endswith(b"\n")
    assert b"Traceback" not in err


SLOW = """
import time
from device_runtime.engine.engine import Engine
quick = Engine.step
Engine.step = lambda self: (time.sleep(0.02), quick(self))[1]
"""
"""Gives the test time to press a key before the tiny model is done."""
