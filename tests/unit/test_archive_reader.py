"""Archives become verified folders: ours, a user's own, from a file or from a pipe."""

import dataclasses
import gzip
import io
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import format_samples
import pytest
from archive_samples import (
    CONFIG,
    WEIGHT,
    archive_of,
    entry,
    member,
    members_of,
    small_package,
    tgz_of,
    tree,
    whole_package,
)

from device_runtime.errors import DeviceError, PackageError, UsageError
from device_runtime.package_format import archive_reader, archive_staging, names
from device_runtime.package_format.archive_names import LMDEPLOY_LINKS
from device_runtime.package_format.archive_reader import extract_archive, open_archive
from device_runtime.package_format.manifest import Manifest
from device_runtime.package_format.package import open_package, verify_package

needs_pigz = pytest.mark.skipif(shutil.which("pigz") is None, reason="pigz is not installed")


def test_what_was_packed_comes_back_and_verifies(tmp_path) -> None:
    package = whole_package(tmp_path / "p")
    data = archive_of(package, tmp_path / "x.tgz")
    extracted = extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(package)
    assert extracted.root == tmp_path / "out"
    assert extracted.manifest == open_package(package).manifest
    assert extracted.files == extracted.manifest.files
    assert extracted.archive_bytes == len(data)
    assert extracted.size_bytes == extracted.manifest.size_bytes
    verify_package(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "p", "x.tgz"]


def test_modes_are_those_of_a_user_not_of_the_archive(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    items = members_of(package)
    for info, _ in items:
        info.mode = 0o7777
    (tmp_path / "x.tgz").write_bytes(tgz_of(*items))
    extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHT).stat().st_mode & 0o7133 == 0
    assert (tmp_path / "out").stat().st_mode & 0o700 == 0o700


def test_a_pipe_is_read_as_it_comes(tmp_path) -> None:
    package = small_package(tmp_path / "p", weight=random.Random(0).randbytes(300_000))
    data = archive_of(package, tmp_path / "x.tgz")
    read_end, write_end = os.pipe()
    sender = subprocess.Popen(["cat", tmp_path / "x.tgz"], stdout=write_end)
    os.close(write_end)
    seen = []
    with open(read_end, "rb", buffering=0) as pipe:
        extract_archive(pipe, tmp_path / "out", lambda *args: seen.append(args))
    assert sender.wait(timeout=10) == 0
    assert tree(tmp_path / "out") == tree(package)
    total = sum(len(content) for content in tree(package).values() if content)
    # A pipe has no size, the manifest says it.
    assert seen[-1] == (total, total)
    seen.clear()
    extract_archive(tmp_path / "x.tgz", tmp_path / "again", lambda *args: seen.append(args))
    assert seen[-1] == (len(data), len(data))


def test_the_manifest_is_known_before_anything_is_written(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    archive_of(package, tmp_path / "x.tgz")
    with open_archive(tmp_path / "x.tgz") as archive:
        assert archive.manifest == Manifest.from_json((package / names.MANIFEST).read_bytes())
        assert archive.manifest_sha256 == entry("x", (package / names.MANIFEST).read_bytes()).sha256
    assert sorted(os.listdir(tmp_path)) == ["p", "x.tgz"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "ws/", "./ws/", "home/me/models/ws/"])
def test_a_package_in_any_order_below_any_folder_is_found(tmp_path, form, prefix) -> None:
    package = small_package(tmp_path / "p")
    (tmp_path / "x.tgz").write_bytes(tgz_of(*members_of(package, prefix), form=form))
    extracted = extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(package)
    assert extracted.manifest is not None
    assert extracted.files == extracted.manifest.files


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--use-compress-program=pigz"], marks=needs_pigz, id="pigz"),
        pytest.param(["--use-compress-program=pigz -0 -b 128"], marks=needs_pigz, id="pigz-0"),
        pytest.param(["--use-compress-program=pigz -i"], marks=needs_pigz, id="pigz-i"),
        pytest.param(["-z"], id="gzip"),
        pytest.param(["-z", "--format=pax"], id="pax"),
        pytest.param(["-z", "--format=ustar"], id="ustar"),
        pytest.param(["-z", "--blocking-factor=1"], id="no-padding"),
    ],
)
@pytest.mark.parametrize("place", [["ws"], ["-C", "ws", "."]], ids=["folder", "dot"])
def test_what_a_user_packs_by_hand_is_read(tmp_path, options, place) -> None:
    package = whole_package(tmp_path / "ws")
    subprocess.run(["tar", *options, "-cf", "x.tgz", *place], cwd=tmp_path, check=True, timeout=60)
    extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(package)


def lmdeploy_workspace(root):
    """A plain workspace with everything LMDeploy's converter writes around it."""
    format_samples.write_workspace(root, dataclasses.replace(format_samples.FP16, head_dim=32))
    (root / "service_docker_up.sh").write_text("#!/bin/sh\n")
    (root / names.TOKENIZER_DIR).mkdir()
    (root / names.TOKENIZER_DIR / "placeholder").touch()
    (root / names.TOKENIZER_DIR / "tokenizer.py").write_text("raise SystemExit\n")
    for path, target in LMDEPLOY_LINKS.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
    (root / names.TRITON_MODELS / "interactive/config.pbtxt").write_text("name\n")
    return root


def test_a_workspace_of_lmdeploy_comes_without_its_links(tmp_path) -> None:
    workspace = lmdeploy_workspace(tmp_path / "workspace")
    # The links of the converter lead where they should, or they would not be the real ones.
    assert (workspace / "model_repository/turbomind").resolve() == (
        workspace / names.TRITON_MODELS / "interactive"
    )
    assert (workspace / names.TRITON_MODELS / "interactive/1/weights").resolve() == (
        workspace / names.WEIGHTS_DIR
    )
    subprocess.run(["tar", "-czf", "x.tgz", "workspace"], cwd=tmp_path, check=True, timeout=60)
    extracted = extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    assert extracted.manifest is None
    assert extracted.manifest_sha256 == ""
    for path in LMDEPLOY_LINKS:
        (workspace / path).unlink()
    assert tree(tmp_path / "out") == tree(workspace)
    assert open_package(tmp_path / "out").name == "tiny"


def test_a_workspace_that_was_converted_but_not_packed_is_read(tmp_path) -> None:
    package = format_samples.write_workspace(tmp_path / "p", format_samples.INT4, is_sealed=False)
    for paths in (members_of(package), members_of(package)[::-1]):
        (tmp_path / "x.tgz").write_bytes(tgz_of(*paths))
        extracted = extract_archive(tmp_path / "x.tgz", tmp_path / "out")
        assert extracted.manifest is not None
        assert not extracted.manifest.is_sealed
        found = {path for path, content in tree(package).items() if content is not None}
        assert {file.path for file in extracted.files} == found - {names.MANIFEST}
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / WEIGHT).write_bytes(b"WEIGHTS of a model"), f"{WEIGHT} has sha256 .* says"),
        (lambda p: (p / WEIGHT).write_bytes(b"short"), "has 5 bytes, manifest.json says 18"),
        (lambda p: (p / WEIGHT).unlink(), f"lacks {WEIGHT}, which its manifest.json lists"),
        (lambda p: (p / "extra").write_bytes(b""), "'(ws/)?extra', which its manifest.json does"),
    ],
)
def test_a_package_that_is_not_what_its_manifest_says_is_refused(
    tmp_path, change, message, is_first
) -> None:
    package = small_package(tmp_path / "p")
    change(package)
    items = members_of(package)
    (tmp_path / "x.tgz").write_bytes(tgz_of(*(items[::-1] if is_first else items)))
    with pytest.raises(PackageError, match=message):
        extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["p", "x.tgz"]


def test_files_outside_of_the_package_are_refused(tmp_path) -> None:
    items = members_of(small_package(tmp_path / "p"))
    (tmp_path / "x.tgz").write_bytes(tgz_of(*items, member("other/file", b"x")))
    with pytest.raises(PackageError, match="'other/file' outside of the package ws/"):
        extract_archive(tmp_path / "x.tgz", tmp_path / "out")


def test_what_is_no_package_is_refused(tmp_path) -> None:
    for items, message in (
        ([], "holds no file"),
        ([member("a", kind=tarfile.DIRTYPE)], "holds no file"),
        ([member("a/b", b"x")], f"holds 0 files called {CONFIG}, expected 1"),
        ([member(f"{x}/{CONFIG}", b"x") for x in "ab"], "holds 2 files called"),
        ([member("a/manifest.json", b"{}")], "format_version"),
        ([member("manifest.json", bytes((16 << 20) + 1))], "16777217 bytes, expected at most"),
    ):
        (tmp_path / "x.tgz").write_bytes(tgz_of(*items))
        with pytest.raises(PackageError, match=message):
            extract_archive(tmp_path / "x.tgz", tmp_path / "out")
        assert os.listdir(tmp_path) == ["x.tgz"]


def test_a_manifest_of_the_tokenizer_is_not_the_packages(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    (package / names.MANIFEST).unlink()
    other = member(f"ws/{names.TOKENIZER_DIR}/manifest.json", b"not ours")
    (tmp_path / "x.tgz").write_bytes(tgz_of(other, *members_of(package)))
    assert extract_archive(tmp_path / "x.tgz", tmp_path / "out").manifest is None


def test_a_package_of_the_future_says_to_update(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    text = (package / names.MANIFEST).read_bytes()
    (package / names.MANIFEST).write_bytes(text.replace(b'version": 1', b'version": 7'))
    for items in (members_of(package), members_of(package)[::-1]):
        (tmp_path / "x.tgz").write_bytes(tgz_of(*items))
        with pytest.raises(PackageError, match=r"version 7 is newer than 1.* update turbojet"):
            extract_archive(tmp_path / "x.tgz", tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["p", "x.tgz"]


def test_a_wrong_path_is_the_users_matter(tmp_path) -> None:
    archive_of(small_package(tmp_path / "p"), tmp_path / "x.tgz")
    with pytest.raises(UsageError, match=r"cannot read .*none\.tgz: No such file"):
        extract_archive(tmp_path / "none.tgz", tmp_path / "out")
    with pytest.raises(UsageError, match=r"is a folder, expected a \.tgz; `turbojet chat`"):
        extract_archive(tmp_path / "p", tmp_path / "out")
    with pytest.raises(UsageError, match="exists; choose a folder that does not"):
        extract_archive(tmp_path / "x.tgz", tmp_path / "p")


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    archive_of(small_package(tmp_path / "p"), tmp_path / "x.tgz")

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_staging.os, "write", full)
    with pytest.raises(DeviceError, match=r"cannot write .*: No space left on device; free some"):
        extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["p", "x.tgz"]


@pytest.mark.parametrize("step", ["open", "mkdir"])
def test_a_disk_that_takes_no_new_names_is_a_sentence(tmp_path, monkeypatch, step) -> None:
    archive_of(small_package(tmp_path / "p"), tmp_path / "x.tgz")
    real = getattr(os, step)

    def refuse(path, *args, **kwargs):
        if str(path).endswith("/weights") or str(path).endswith(".weight"):
            raise OSError(122, "Disk quota exceeded")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(DeviceError, match=r"cannot write .*weights?: Disk quota exceeded; free"):
        extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["p", "x.tgz"]


def test_a_disk_that_fails_to_sync_is_a_sentence(tmp_path, monkeypatch) -> None:
    archive_of(small_package(tmp_path / "p"), tmp_path / "x.tgz")

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(archive_staging, "sync_file", fail)
    with pytest.raises(DeviceError, match=r"cannot write .*: Input/output error"):
        extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["p", "x.tgz"]


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path) -> None:
    archive_of(small_package(tmp_path / "p"), tmp_path / "x.tgz")
    with pytest.raises(DeviceError, match=r"cannot write .*x\.tgz: .*; free some space or choose"):
        extract_archive(tmp_path / "x.tgz", tmp_path / "x.tgz" / "out")


def test_everything_is_on_the_disk_before_the_folder_appears(tmp_path, monkeypatch) -> None:
    package = small_package(tmp_path / "p")
    archive_of(package, tmp_path / "x.tgz")
    events = []
    monkeypatch.setattr(archive_staging, "sync_file", lambda p: events.append(p.name))
    monkeypatch.setattr(archive_staging, "sync_folder", lambda p: events.append(p.name + "/"))
    monkeypatch.setattr(archive_reader, "sync_folder", lambda p: events.append(p))
    monkeypatch.setattr(
        archive_reader.os, "rename", lambda a, b: (events.append("rename"), os.replace(a, b))
    )
    extract_archive(tmp_path / "x.tgz", tmp_path / "out")
    at = events.index("rename")
    assert sorted(events[:3]) == ["config.ini", "manifest.json", "norm.weight"]
    assert events[3:at] == ["weights/", "triton_models/", "tiny-1.0/", "out/"]
    assert events[at:] == ["rename", tmp_path]


def test_an_interrupt_leaves_nothing(tmp_path) -> None:
    archive_of(small_package(tmp_path / "p"), tmp_path / "x.tgz")

    def interrupt(done_bytes: int, total_bytes: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_archive(tmp_path / "x.tgz", tmp_path / "out", interrupt)
    assert sorted(os.listdir(tmp_path)) == ["p", "x.tgz"]


def test_gzip_members_of_any_size_are_read(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    tar = gzip.decompress(archive_of(package, tmp_path / "x.tgz"))
    pieces = b"".join(gzip.compress(tar[at : at + 100]) for at in range(0, len(tar), 100))
    extract_archive(io.BytesIO(pieces), tmp_path / "out")
    assert tree(tmp_path / "out") == tree(package)
