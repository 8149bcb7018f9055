"""Archives we write: the same bytes everywhere, manifest first, read by every tar."""

import dataclasses
import gzip
import io
import os
import shutil
import subprocess
import tarfile
from types import SimpleNamespace

import pytest
from archive_samples import CONFIG, WEIGHT, archive_of, seal, small_package, tree

from device_runtime.errors import DeviceError, PackageError
from device_runtime.package_format import names
from device_runtime.package_format.archive_gzip import MEMBER_DATA_BYTES, stored_member
from device_runtime.package_format.archive_ustar import file_header
from device_runtime.package_format.archive_writer import ArchiveSummary, write_archive
from device_runtime.package_format.manifest import Manifest

needs_pigz = pytest.mark.skipif(shutil.which("pigz") is None, reason="pigz is not installed")


def test_an_archive_is_known_to_the_byte(tmp_path) -> None:
    weight = os.urandom(MEMBER_DATA_BYTES + 100)
    package = small_package(tmp_path / "p", weight=weight)
    manifest = (package / names.MANIFEST).read_bytes()
    tar = b""
    for path, data in ((names.MANIFEST, manifest), (CONFIG, b"[llama]\n"), (WEIGHT, weight)):
        tar += file_header(f"tiny-1.0/{path}", len(data)) + data + bytes(-len(data) % 512)
    tar += bytes(1024)
    expected = stored_member(tar[:MEMBER_DATA_BYTES]) + stored_member(tar[MEMBER_DATA_BYTES:])
    assert archive_of(package, tmp_path / "x.tgz") == expected


def test_equal_packages_give_equal_archives(tmp_path, monkeypatch) -> None:
    weight = os.urandom(3 * MEMBER_DATA_BYTES + 12345)
    first = small_package(tmp_path / "a", weight=weight)
    second = tmp_path / "b" / "elsewhere"
    shutil.copytree(first, second)
    for path in [*second.rglob("*"), second]:
        os.utime(path, (1, 1))
        path.chmod(0o700)
    data = archive_of(first, tmp_path / "a.tgz")
    for num_cpus in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda num_cpus=num_cpus: num_cpus)
        assert archive_of(second, tmp_path / "b.tgz") == data


def test_the_manifest_comes_first_and_the_rest_is_sorted(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    (package / "kernels").mkdir()
    (package / "kernels/Z.cubin").write_bytes(b"z")
    (package / "kernels/a.cubin").write_bytes(b"")
    seal(package)
    data = archive_of(package, tmp_path / "x.tgz")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == [
            f"tiny-1.0/{path}"
            for path in ("manifest.json", "kernels/Z.cubin", "kernels/a.cubin", CONFIG, WEIGHT)
        ]
        for info in tar.getmembers():
            facts = (info.mode, info.uid, info.gid, info.uname, info.gname, info.mtime)
            assert facts == (0o644, 0, 0, "", "", 946_684_800)


def test_the_summary_counts_files_and_bytes(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    seen = []
    summary = write_archive(package, tmp_path / "new" / "x.tgz", lambda *args: seen.append(args))
    data_bytes = sum((package / p).stat().st_size for p in (names.MANIFEST, CONFIG, WEIGHT))
    size = (tmp_path / "new" / "x.tgz").stat().st_size
    assert summary == ArchiveSummary(tmp_path / "new" / "x.tgz", 3, data_bytes, size)
    tar_bytes = len(gzip.decompress((tmp_path / "new" / "x.tgz").read_bytes()))
    assert seen == [(tar_bytes, tar_bytes)]


def test_files_that_the_manifest_does_not_list_stay_out(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    before = archive_of(package, tmp_path / "x.tgz")
    (package / "stage.json").write_text("{}")
    assert archive_of(package, tmp_path / "x.tgz") == before


@pytest.mark.parametrize("weight_bytes", [0, 1, 511, 512, 513, MEMBER_DATA_BYTES])
def test_python_reads_what_we_write(tmp_path, weight_bytes: int) -> None:
    package = small_package(tmp_path / "p", weight=os.urandom(weight_bytes))
    data = archive_of(package, tmp_path / "x.tgz")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for path, content in tree(package).items():
            if content is not None:
                file = tar.extractfile(f"tiny-1.0/{path}")
                assert file is not None
                assert file.read() == content


@pytest.mark.parametrize(
    "options",
    [["-xzf"], pytest.param(["--use-compress-program=pigz", "-xf"], marks=needs_pigz)],
    ids=["xzf", "pigz"],
)
def test_tar_reads_what_we_write(tmp_path, options: list[str]) -> None:
    package = small_package(tmp_path / "p", weight=os.urandom(MEMBER_DATA_BYTES + 999))
    archive_of(package, tmp_path / "x.tgz")
    done = subprocess.run(
        ["tar", *options, "x.tgz"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "tiny-1.0") == tree(package)


def test_gzip_finds_nothing_wrong(tmp_path) -> None:
    archive_of(small_package(tmp_path / "p"), tmp_path / "x.tgz")
    subprocess.run(["gzip", "--test", "--verbose", "x.tgz"], cwd=tmp_path, check=True, timeout=60)


def test_an_archive_is_replaced_whole_or_not_at_all(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    old = archive_of(package, tmp_path / "x.tgz")
    (package / WEIGHT).write_bytes(b"WEIGHTS OF A MODEL")
    with pytest.raises(PackageError, match=f"{WEIGHT} changed after it was listed"):
        write_archive(package, tmp_path / "x.tgz")
    assert (tmp_path / "x.tgz").read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["p", "x.tgz"]


def test_a_package_that_is_not_what_its_manifest_says_is_refused(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    (package / WEIGHT).write_bytes(b"longer than the weights of a model")
    with pytest.raises(PackageError, match=r"has 34 bytes, manifest.json says 18; pack again"):
        write_archive(package, tmp_path / "x.tgz")
    (package / WEIGHT).unlink()
    with pytest.raises(PackageError, match=f"cannot read .*{WEIGHT}: No such file"):
        write_archive(package, tmp_path / "x.tgz")
    (package / WEIGHT).symlink_to(package / CONFIG)
    with pytest.raises(PackageError, match=f"cannot read .*{WEIGHT}: Too many levels"):
        write_archive(package, tmp_path / "x.tgz")
    assert os.listdir(tmp_path) == ["p"]


def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path, monkeypatch) -> None:
    package = small_package(tmp_path / "p", weight=b"w" * 18, config=b"[llama]\n;123456789")
    (package / WEIGHT).write_bytes(b"short")
    monkeypatch.setattr(os, "fstat", lambda descriptor: SimpleNamespace(st_size=18))
    with pytest.raises(PackageError, match="shrank while it was packed"):
        write_archive(package, tmp_path / "x.tgz")


def test_what_was_not_packed_says_which_command_does(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    sealed = Manifest.from_json((package / names.MANIFEST).read_bytes())
    (package / names.MANIFEST).write_bytes(dataclasses.replace(sealed, files=()).to_json())
    with pytest.raises(PackageError, match="lists no files; `turbojet-host pack` writes the list"):
        write_archive(package, tmp_path / "x.tgz")
    (package / names.MANIFEST).unlink()
    with pytest.raises(PackageError, match="No such file or directory; `turbojet-host pack`"):
        write_archive(package, tmp_path / "x.tgz")


def test_an_output_that_cannot_be_written_is_a_sentence(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    (tmp_path / "x.tgz").mkdir()
    with pytest.raises(DeviceError, match=r"cannot write .*x\.tgz: Is a directory"):
        write_archive(package, tmp_path / "x.tgz")
    assert sorted(os.listdir(tmp_path)) == ["p", "x.tgz"]
