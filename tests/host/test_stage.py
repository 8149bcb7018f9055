import hashlib
import json
import multiprocessing
import os
import shutil

import pytest

from device_runtime.errors import PackageError, UsageError
from host_tools.content_hash import ContentHasher, content_files, file_sha256
from host_tools.stage import Stage, exclusive, read_record

# printf 'abc' | sha256sum
ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def folders(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    (source / "a.txt").write_text("abc")
    return source, output


def age(path):
    """Make a file old enough that its hash is remembered."""
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns - 10 * 10**9))


def make_stage(source, output, **settings):
    return Stage("copy", output, (source,), settings or {"bits": 4})


def finish(stage, output):
    (output / "b.txt").write_text("result")
    stage.record([output / "b.txt"])


def test_a_file_hash_is_sha256(folders):
    assert file_sha256(folders[0] / "a.txt") == ABC_SHA256


def test_content_skips_dotted_names_and_sorts(folders):
    source, _ = folders
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("x")
    (source / "sub").mkdir()
    (source / "sub" / "b").write_text("b")
    (source / ".hidden").write_text("h")
    assert [name for name, _ in content_files(source)] == ["a.txt", "sub/b"]


def test_the_hash_of_a_folder_is_of_its_names_and_contents(folders):
    source, output = folders
    (source / "a.txt").rename(source / "é.txt")
    expected = hashlib.sha256(f"{ABC_SHA256}  é.txt\n".encode()).hexdigest()
    assert ContentHasher(output / "hashes.json").hash_tree(source) == expected


def test_names_that_are_not_utf8_are_content_too(folders):
    source, output = folders
    stage = make_stage(source, output)
    before = stage.input_hashes
    with open(os.fsencode(source) + b"/r\xe9sum\xe9.txt", "w") as stream:
        stream.write("abc")
    stage = make_stage(source, output)
    assert stage.input_hashes != before
    copied = output / os.fsdecode(b"r\xe9sum\xe9.txt")
    copied.write_text("abc")
    stage.record([copied])
    assert make_stage(source, output).is_finished()
    record = read_record(output, "copy")
    assert record is not None and (record.size_bytes, record.hashes) == (3, (ABC_SHA256,))


def test_a_missing_input_is_named(folders):
    source, output = folders
    with pytest.raises(PackageError, match=r"nowhere is not there, run the stage that makes it"):
        _ = make_stage(source / "nowhere", output).fingerprint


def test_a_stage_is_finished_only_after_its_record(folders):
    source, output = folders
    assert not make_stage(source, output).is_finished()
    finish(make_stage(source, output), output)
    assert make_stage(source, output).is_finished()


def test_a_changed_input_setting_or_version_is_not_finished(folders):
    source, output = folders
    finish(make_stage(source, output), output)
    assert not make_stage(source, output, bits=8).is_finished()
    assert not Stage("copy", output, (source,), {"bits": 4}, version=2).is_finished()
    (source / "a.txt").write_text("abd")
    assert not make_stage(source, output).is_finished()
    (source / "a.txt").write_text("abc")
    assert make_stage(source, output).is_finished()


def test_a_renamed_input_file_is_another_input_but_a_moved_folder_is_the_same(folders, tmp_path):
    source, output = folders
    finish(make_stage(source, output), output)
    source.rename(tmp_path / "moved")
    assert make_stage(tmp_path / "moved", output).is_finished()
    (tmp_path / "moved" / "a.txt").rename(tmp_path / "moved" / "c.txt")
    assert not make_stage(tmp_path / "moved", output).is_finished()


@pytest.mark.parametrize("damage", ["missing", "changed", "record", "forgotten"])
def test_damaged_outputs_are_made_again(folders, damage):
    source, output = folders
    stage = make_stage(source, output)
    finish(stage, output)
    if damage == "missing":
        (output / "b.txt").unlink()
    elif damage == "changed":
        (output / "b.txt").write_text("resulT")
    elif damage == "record":
        stage.record_path.write_text("{")
    else:
        stage.forget()
    assert not make_stage(source, output).is_finished()


def test_outputs_outside_the_folder_are_watched_too(folders, tmp_path):
    source, output = folders
    (tmp_path / "x.tgz").write_text("archive")
    make_stage(source, output).record([tmp_path / "x.tgz"])
    assert make_stage(source, output).is_finished()
    (tmp_path / "x.tgz").unlink()
    assert not make_stage(source, output).is_finished()


def test_a_file_at_rest_is_read_once(folders, monkeypatch):
    source, output = folders
    age(source / "a.txt")
    memory = output / "hashes.json"
    assert ContentHasher(memory).hash_files([source / "a.txt"]) == [ABC_SHA256]
    monkeypatch.setattr("host_tools.content_hash.file_sha256", lambda path: "read again")
    assert ContentHasher(memory).hash_files([source / "a.txt"]) == [ABC_SHA256]


def test_a_file_that_changed_just_now_is_read_again(folders, monkeypatch):
    source, output = folders
    memory = output / "hashes.json"
    ContentHasher(memory).hash_files([source / "a.txt"])
    monkeypatch.setattr("host_tools.content_hash.file_sha256", lambda path: "read again")
    assert ContentHasher(memory).hash_files([source / "a.txt"]) == ["read again"]


def test_a_damaged_memory_of_hashes_is_an_empty_one(folders):
    source, output = folders
    for text in ("{", "[1]"):
        (output / "hashes.json").write_text(text)
        hasher = ContentHasher(output / "hashes.json")
        assert hasher.hash_files([source / "a.txt"]) == [ABC_SHA256]


def test_the_record_says_what_was_asked_for(folders):
    source, output = folders
    stage = make_stage(source, output)
    finish(stage, output)
    record = json.loads(stage.record_path.read_text())
    assert record["stage"] == "copy"
    assert record["settings"] == {"bits": 4}
    assert list(record["outputs"]) == ["b.txt"]


def hold(folder, is_held, may_go):
    with exclusive(folder):
        is_held.set()
        may_go.wait(30)


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    is_held, may_go = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, is_held, may_go))
    holder.start()
    assert is_held.wait(30)
    with (
        pytest.raises(UsageError, match="another turbojet-host is at work in"),
        exclusive(tmp_path),
    ):
        pass
    holder.kill()  # even a process that dies lets go
    holder.join()
    with exclusive(tmp_path):
        pass


def test_a_record_can_be_read_for_a_report(folders):
    source, output = folders
    stage = make_stage(source, output)
    assert read_record(output, "copy") is None
    finish(stage, output)
    first = read_record(output, "copy")
    assert first.size_bytes == len("result")
    assert read_record(output, "copy") == first
    stage.record_path.write_text("[]")
    assert read_record(output, "copy") is None


def test_locks_of_different_names_do_not_exclude_each_other(tmp_path):
    with exclusive(tmp_path, "build-lock"), exclusive(tmp_path):
        pass


def test_a_record_takes_its_place_together_with_the_result(folders):
    source, output = folders
    stage = Stage("copy", output / "result", (source,), {"bits": 4})
    assert not stage.is_finished()
    part = output / ".result.part"
    part.mkdir()
    (part / "b.txt").write_text("result")
    age(part / "b.txt")
    stage.record([part / "b.txt"], part)
    assert not stage.is_finished()
    shutil.rmtree(output / "result", ignore_errors=True)
    part.rename(output / "result")
    assert Stage("copy", output / "result", (source,), {"bits": 4}).is_finished()


def test_hashes_are_remembered_when_their_folder_moves(folders, monkeypatch):
    _, output = folders
    (output / "one" / ".turbojet").mkdir(parents=True)
    (output / "one" / "a.txt").write_text("abc")
    age(output / "one" / "a.txt")
    memory = ".turbojet/hashes.json"
    ContentHasher(output / "one" / memory).hash_files([output / "one" / "a.txt"])
    (output / "one").rename(output / "two")
    monkeypatch.setattr("host_tools.content_hash.file_sha256", lambda path: "read again")
    hasher = ContentHasher(output / "two" / memory)
    assert hasher.hash_files([output / "two" / "a.txt"]) == [ABC_SHA256]
