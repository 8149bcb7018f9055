import fcntl
import os
import re
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from test_convert_bytes import GQA_64, int4_tensors
from tiny_checkpoints import write_checkpoint
from tiny_tokenizer import write_tokenizer

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.archive_reader import extract_archive
from device_runtime.package_format.package import open_package, verify_package
from host_tools import pack as pack_module
from host_tools.convert import convert
from host_tools.pack import pack, pack_once
from host_tools.package_options import ConfigValues, ConvertOptions, PackOptions
from host_tools.progress import Progress
from host_tools.stage import exclusive

NANO = PackOptions("orin-nano-8gb", "none")


class Notes(Progress):
    """Keeps what a stage says."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack") / "source"
    write_checkpoint(folder, GQA_64.config(), int4_tensors(GQA_64, 64))
    write_tokenizer(folder)
    return folder


@pytest.fixture
def workspace(source, tmp_path):
    return convert(source, tmp_path / "tm", ConvertOptions("tiny"), Progress())


def test_the_archive_installs_as_the_workspace_it_was(workspace, tmp_path):
    summary = pack(workspace, tmp_path / "x.tgz", NANO, Progress())
    assert summary.archive_bytes == (tmp_path / "x.tgz").stat().st_size
    extract_archive(tmp_path / "x.tgz", tmp_path / "installed")
    package = verify_package(tmp_path / "installed")
    original = open_package(workspace)
    assert package.config == original.config
    assert package.model == original.model
    assert package.manifest.target_boards == ("orin-nano-8gb",)
    assert [plan.board for plan in package.manifest.memory] == ["orin-nano-8gb"]
    for spec in original.specs:
        assert (package.root / spec.path).read_bytes() == (workspace / spec.path).read_bytes()


def test_tar_reads_it_with_the_manifest_first_and_no_records(workspace, tmp_path):
    pack(workspace, tmp_path / "x.tgz", NANO, Progress())
    listed = subprocess.run(
        ["tar", "tzf", tmp_path / "x.tgz"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert listed[0] == "tiny/manifest.json"
    assert "tiny/triton_models/weights/config.ini" in listed
    assert not [name for name in listed if ".turbojet" in name]


def test_the_workspace_stays_as_it_was(workspace, tmp_path):
    before = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    pack(workspace, tmp_path / "x.tgz", NANO, Progress())
    after = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    assert after == before
    assert not open_package(workspace).manifest.is_sealed


def test_the_same_workspace_gives_the_same_bytes(workspace, tmp_path):
    pack(workspace, tmp_path / "one.tgz", NANO, Progress())
    for path in (workspace / "triton_models/weights/norm.weight", workspace / "manifest.json"):
        os.utime(path)
    pack(workspace, tmp_path / "two.tgz", NANO, Progress())
    assert (tmp_path / "one.tgz").read_bytes() == (tmp_path / "two.tgz").read_bytes()


def test_triton_folders_and_other_strangers_stay_behind(workspace, tmp_path):
    (workspace / "service_docker_up.sh").write_text("TP=1")
    (workspace / "triton_models" / "interactive").mkdir()
    (workspace / "triton_models" / "interactive" / "config.pbtxt").write_text("x")
    (workspace / "triton_models" / "weights" / "notes.txt").write_text("x")
    pack(workspace, tmp_path / "x.tgz", NANO, Progress())
    with tarfile.open(tmp_path / "x.tgz") as archive:
        names = archive.getnames()
    assert not [name for name in names if name.endswith((".sh", ".pbtxt", ".txt"))]


def test_config_ini_edited_by_hand_is_packed_and_planned_for(workspace, tmp_path):
    config = workspace / "triton_models" / "weights" / "config.ini"
    config.write_text(config.read_text().replace("quant_policy = 0", "quant_policy = 8"))
    pack(workspace, tmp_path / "x.tgz", NANO, Progress())
    extract_archive(tmp_path / "x.tgz", tmp_path / "installed")
    package = open_package(tmp_path / "installed")
    assert package.config.quant_policy == 8
    assert package.manifest.memory[0].quant_policy == 8


def test_config_ini_edited_to_what_no_device_runs_is_refused(workspace, tmp_path):
    config = workspace / "triton_models" / "weights" / "config.ini"
    text = config.read_text()
    config.write_text(text.replace("quant_policy = 0", "quant_policy = 5"))
    with pytest.raises(PackageError, match="quant_policy"):
        pack(workspace, tmp_path / "x.tgz", NANO, Progress())
    config.write_text(text.replace("cache_block_seq_len = 128", "cache_block_seq_len = -64"))
    with pytest.raises(PackageError, match="cache_block_seq_len"):
        pack(workspace, tmp_path / "x.tgz", NANO, Progress())
    assert not (tmp_path / "x.tgz").exists()


def test_a_session_that_the_board_cannot_hold_is_warned_of(source, tmp_path):
    values = ConfigValues(cache_max_entry_count=1.0, cache_block_seq_len=64)
    workspace = convert(source, tmp_path / "tm", ConvertOptions("tiny", config=values), Progress())
    notes = Notes()
    pack(workspace, tmp_path / "x.tgz", NANO, notes)
    # one page of 64 tokens; max_position_embeddings 256 + 8
    assert (
        "warning: orin-nano-8gb: session_len is cut from 264 to 64 tokens: the KV cache holds 1 "
        "pages of 64"
    ) in notes.lines


def test_pages_that_the_board_cannot_hold_are_warned_of(source, tmp_path):
    values = ConfigValues(cache_max_entry_count=1e7)
    workspace = convert(source, tmp_path / "tm", ConvertOptions("tiny", config=values), Progress())
    notes = Notes()
    pack(workspace, tmp_path / "x.tgz", NANO, notes)
    pattern = r"warning: orin-nano-8gb: cache_max_entry_count is cut from 10000000 to \d+ pages of"
    assert any(re.match(pattern, line) for line in notes.lines)


def test_all_takes_every_board_that_can_hold_the_model(workspace, tmp_path):
    pack(workspace, tmp_path / "x.tgz", PackOptions(kernels="none"), Progress())
    with tarfile.open(tmp_path / "x.tgz") as archive:
        text = archive.extractfile("tiny/manifest.json").read().decode()
    assert "orin-nano-4gb" in text
    assert "thor" in text


def test_an_unknown_board_is_refused(workspace, tmp_path):
    with pytest.raises(UsageError, match="no board is called 'orin-nano-9gb'"):
        pack(workspace, tmp_path / "x.tgz", PackOptions("orin-nano-9gb", "none"), Progress())
    assert not (tmp_path / "x.tgz").exists()


def test_a_folder_as_output_is_refused(workspace, tmp_path):
    with pytest.raises(UsageError, match="is a folder, name the archive to write in it"):
        pack(workspace, tmp_path, NANO, Progress())


def test_a_name_that_leaves_no_room_for_what_is_written_beside_it_is_refused(workspace, tmp_path):
    # 251 bytes and the five of .part are one more than a file's name can have.
    with pytest.raises(UsageError, match=r"has 256 bytes, a file's name at most 255; name a sho"):
        pack(workspace, tmp_path / f"{'x' * 247}.tgz", PackOptions("thor", "none"), Progress())
    with pytest.raises(UsageError, match=r"has 309 bytes"):
        pack(workspace, tmp_path / f"{'x' * 300}.tgz", PackOptions("thor", "none"), Progress())
    longest = tmp_path / f"{'x' * 246}.tgz"
    assert pack(workspace, longest, PackOptions("thor", "none"), Progress()).path == longest


def test_a_file_that_is_no_archive_is_not_written_over(workspace, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UsageError, match="exists and is no archive, name another output or remov"):
        pack(workspace, tmp_path / "model.safetensors", NANO, Progress())
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which root could replace
    with pytest.raises(UsageError, match="pipe exists and is no archive"):
        pack(workspace, tmp_path / "pipe", NANO, Progress())
    (tmp_path / "x.tgz").touch()  # as mktemp leaves it
    assert pack(workspace, tmp_path / "x.tgz", NANO, Progress()).archive_bytes


def test_who_packs_into_the_same_folder_waits(workspace, tmp_path):
    output = tmp_path / "out" / "x.tgz"
    output.parent.mkdir()
    other = os.open(output.parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    notes = Notes()
    with ThreadPoolExecutor(1) as pool:
        packed = pool.submit(pack, workspace, output, NANO, notes)
        assert not wait([packed], timeout=0.5).done
        assert list(output.parent.iterdir()) == []
        os.close(other)
        assert packed.result().path == output
    assert notes.lines[-1] == f"pack: waiting for another process that packs into {output.parent}"


def test_who_packs_the_same_workspace_is_refused(workspace, tmp_path):
    """Its links to the workspace's files would be taken away."""
    with (
        exclusive(workspace),
        pytest.raises(UsageError, match="another turbojet-host is at work in"),
    ):
        pack(workspace, tmp_path / "x.tgz", NANO, Progress())
    assert pack(workspace, tmp_path / "x.tgz", NANO, Progress()).archive_bytes


def test_a_workspace_of_lmdeploy_is_packed_with_tar(source, tmp_path):
    config = GQA_64.config(num_attention_heads=2, num_key_value_heads=2)
    folder = tmp_path / "plain"
    write_checkpoint(folder, config, int4_tensors(GQA_64, 64) | plain_tensors(config))
    write_tokenizer(folder)
    workspace = convert(folder, tmp_path / "tm", ConvertOptions("tiny"), Progress())
    (workspace / "manifest.json").unlink()
    with pytest.raises(PackageError, match=r"has no manifest\.json; LMDeploy's own workspaces are"):
        pack(workspace, tmp_path / "x.tgz", NANO, Progress())


def plain_tensors(config):
    """Attention of 2 heads of 64 on 128 hidden, in place of GQA_64's."""
    from test_convert_bytes import Shape

    tensors = int4_tensors(Shape(64, 2, 2), 64)
    return {name: value for name, value in tensors.items() if "self_attn" in name}


def test_a_damaged_workspace_is_not_packed(workspace, tmp_path):
    (workspace / "triton_models" / "weights" / "norm.weight").unlink()
    with pytest.raises(PackageError, match=r"norm\.weight is missing"):
        pack(workspace, tmp_path / "x.tgz", NANO, Progress())


def test_without_hard_links_the_files_are_copied(workspace, tmp_path, monkeypatch):
    pack(workspace, tmp_path / "linked.tgz", NANO, Progress())

    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(pack_module.os, "link", refuse)
    pack(workspace, tmp_path / "copied.tgz", NANO, Progress())
    assert (tmp_path / "copied.tgz").read_bytes() == (tmp_path / "linked.tgz").read_bytes()


def test_a_finished_archive_is_kept_until_something_changes(workspace, tmp_path):
    output, notes = tmp_path / "x.tgz", Notes()
    pack_once(workspace, output, tmp_path / "work", NANO, notes)
    made_ns = output.stat().st_mtime_ns
    pack_once(workspace, output, tmp_path / "work", NANO, notes)
    assert output.stat().st_mtime_ns == made_ns
    assert notes.lines[-1] == f"pack: {output} is up to date"
    pack_once(workspace, output, tmp_path / "work", PackOptions("thor", "none"), notes)
    assert output.stat().st_mtime_ns > made_ns
    other = tmp_path / "other.tgz"
    pack_once(workspace, other, tmp_path / "work", PackOptions("thor", "none"), notes)
    assert other.read_bytes() == output.read_bytes()
