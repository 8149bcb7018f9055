"""Saved conversations: whole or not there, and read with suspicion."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from device_runtime.engine.conversation_file import (
    MAX_FILE_BYTES,
    load_conversation,
    save_conversation,
)
from device_runtime.errors import DeviceError, RequestError
from device_runtime.templates.message import Message

TALK = (Message("user", "你好"), Message("assistant", "Hi \x1b[1m"))


def text_of(**changes: object) -> str:
    value: dict[str, object] = {
        "format": "turbojet-conversation",
        "version": 1,
        "system": None,
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }
    return json.dumps(value | changes)


def test_a_conversation_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    save_conversation(path, "Be brief.", TALK)
    saved = load_conversation(path)
    assert (saved.system, saved.messages) == ("Be brief.", TALK)
    assert os.listdir(tmp_path) == ["talk.json"]


def test_the_file_is_readable_and_holds_no_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    save_conversation(path, None, TALK)
    text = path.read_text(encoding="utf-8")
    assert "你好" in text
    assert "\x1b" not in text


def test_saving_again_replaces_the_conversation(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    save_conversation(path, None, TALK)
    save_conversation(path, "", ())
    saved = load_conversation(path)
    assert (saved.system, saved.messages) == ("", ())


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(RequestError, match="exists and is no conversation"):
        save_conversation(path, None, TALK)
    assert path.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cannot write .*: No such file or directory"):
        save_conversation(tmp_path / "none" / "x.json", None, TALK)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("hello", "is not JSON"),
        ("[]", "is a list, expected an object"),
        ("[" * 100_000, "nests too deep"),
        ('{"messages": ' + "9" * 5000 + "}", "beyond 64 bits"),
        (text_of(format="other"), "format is 'other', expected one of turbojet-conversation"),
        (text_of(version=2), "its version 2 is newer than 1, update turbojet"),
        (text_of(version="1"), "version is a string"),
        (text_of(extra=1), "unknown key 'extra'"),
        (text_of(messages={}), "messages is an object, expected a list"),
        (text_of(system=1), "system is a whole number, expected a string"),
        (text_of(messages=[1]), r"messages\[0\] is a whole number"),
        (text_of(messages=[{"role": "user"}]), "lacks the key 'content'"),
        (text_of(messages=[{"role": "user", "content": 5}]), "expected a string"),
        (text_of(messages=[{"role": "root", "content": ""}]), "has the role 'root'"),
        (text_of(messages=[{"role": "user", "content": "\ud800"}]), "half a surrogate pair"),
        (text_of(messages=[{"role": "user", "content": "a"}]), "last question has no answer"),
        (
            text_of(messages=[{"role": "assistant", "content": "a"}] * 2),
            "message 1 is of 'assistant', expected user",
        ),
    ],
)
def test_a_malformed_file_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=f"cannot load .*bad.json: .*{message}") as caught:
        load_conversation(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(RequestError, match="is not JSON"):
        load_conversation(path)


def test_a_file_that_is_too_long_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 2)
    with pytest.raises(RequestError, match=f"expected at most {MAX_FILE_BYTES}"):
        load_conversation(path)


def test_pipes_devices_and_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(RequestError, match="it is no regular file"):
            load_conversation(path)
    with pytest.raises(RequestError, match=r"cannot load .*: Is a directory|no regular file"):
        load_conversation(tmp_path)
    with pytest.raises(RequestError, match="No such file"):
        load_conversation(tmp_path / "none.json")
