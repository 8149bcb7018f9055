"""Folders of cubins: the whole set, and what a package takes to its boards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from test_convert_bytes import GQA_64, int4_tensors
from tiny_checkpoints import write_checkpoint
from tiny_tokenizer import write_tokenizer

from device_runtime.errors import DeviceError, PackageError, UsageError
from device_runtime.kernels.cubins import RECORD, choose_cubins, read_record
from device_runtime.package_format.archive_reader import extract_archive
from device_runtime.package_format.boards import BOARDS
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import open_package, verify_package
from host_tools import kernel_sets
from host_tools.convert import convert
from host_tools.kernel_sets import (
    build_kernels,
    kernels_fingerprint,
    package_units,
    write_package_kernels,
)
from host_tools.kernels import BUILDS, KernelCache, builds_for, sources_sha256
from host_tools.nvrtc import WHEELS
from host_tools.pack import pack
from host_tools.package_options import ConvertOptions, PackOptions
from host_tools.progress import Progress

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
ORIN = (BOARDS["orin-nano-8gb"],)
pytestmark = pytest.mark.skipif(
    not all((CACHE_DIR / "nvrtc" / release).is_dir() for release in WHEELS),
    reason="scripts/fetch-compilers gets the compilers; scripts/test runs it",
)


@pytest.fixture(autouse=True)
def two_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """All builds and group sizes, of two small sources."""
    monkeypatch.setattr(kernel_sets, "SOURCES", ("embedding", "w4a16_gemv_1"))


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(CACHE_DIR / "nvrtc", tmp_path / "cubins")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    write_checkpoint(folder / "source", GQA_64.config(), int4_tensors(GQA_64, 64))
    write_tokenizer(folder / "source")
    return convert(folder / "source", folder / "tm", ConvertOptions("tiny"), Progress())


@pytest.fixture
def model(workspace: Path) -> ModelConfig:
    return open_package(workspace).model


def test_a_folder_of_cubins_has_a_record_that_a_device_chooses_from(
    tmp_path: Path, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_sets, "SOURCES", ("embedding",))
    folder = build_kernels(tmp_path / "kernels", builds_for([87]), cache, Progress())
    record = read_record(folder)
    assert len(record) == 3  # CUDA 11.8, 12.6 and 13.0
    for cubin in record:
        data = (folder / cubin.file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == cubin.sha256
        assert cubin.sources_sha256 == sources_sha256("embedding")
        assert "-arch=sm_87" in cubin.flags
    chosen = choose_cubins(record, 87, (12, 2))
    assert chosen["embedding", 0].cuda == "12.6"
    build_kernels(folder, builds_for([87]), cache, Progress())  # replaces its own
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cubins", "kernels"]


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path, cache: KernelCache) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="exists and is no folder of kernels"):
        build_kernels(tmp_path, BUILDS, cache, Progress())
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_package_takes_its_boards_and_its_group_size_only(model: ModelConfig) -> None:
    files = {unit.file for unit in package_units(model, ORIN)}
    assert files == {
        f"sm_87-cuda{cuda}.{name}.cubin"
        for cuda in ("11.8", "12.6", "13.0")
        for name in ("embedding", "w4a16_gemv_1.g64")
    }


def test_an_archive_carries_the_kernels_of_its_boards(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_sets, "SOURCES", ("embedding",))
    monkeypatch.setenv("TURBOJET_CACHE_DIR", str(CACHE_DIR))
    pack(workspace, tmp_path / "x.tgz", PackOptions("orin-nano-8gb,thor"), Progress())
    extract_archive(tmp_path / "x.tgz", tmp_path / "installed")
    package = verify_package(tmp_path / "installed")
    cubins = read_record(package.kernels_dir)
    assert {(cubin.sm, cubin.cuda) for cubin in cubins} == {
        (87, "11.8"), (87, "12.6"), (87, "13.0"), (110, "13.0"),
    }  # fmt: skip
    for cubin in cubins:
        data = (package.kernels_dir / cubin.file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == cubin.sha256
        assert cubin.sources_sha256 == sources_sha256("embedding")
    assert not (workspace / "kernels").exists()


def test_no_kernels_leave_no_folder(workspace: Path, tmp_path: Path) -> None:
    pack(workspace, tmp_path / "x.tgz", PackOptions("thor", "none"), Progress())
    extract_archive(tmp_path / "x.tgz", tmp_path / "installed")
    assert not (tmp_path / "installed" / "kernels").exists()


def test_kernels_made_elsewhere_are_copied_and_checked(
    model: ModelConfig, tmp_path: Path, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_sets, "SOURCES", ("embedding",))
    made = build_kernels(tmp_path / "made", builds_for([87]), cache, Progress())

    def write(name: str) -> Path:
        folder = tmp_path / name
        write_package_kernels(folder, model, ORIN, str(made), cache, Progress())
        return folder

    assert read_record(write("copied")) == read_record(made)
    (made / "sm_87-cuda12.6.embedding.cubin").write_bytes(b"other")
    with pytest.raises(PackageError, match=r"12\.6\.embedding\.cubin is not what its record says"):
        write("damaged")
    monkeypatch.setattr(kernel_sets, "SOURCES", ("embedding", "rms_norm"))
    (made / "sm_87-cuda12.6.embedding.cubin").write_bytes(
        (tmp_path / "copied" / "sm_87-cuda12.6.embedding.cubin").read_bytes()
    )
    with pytest.raises(UsageError, match=r"has no sm_87-cuda11\.8\.rms_norm\.cubin, which a"):
        write("lacking")
    (made / RECORD).unlink()
    with pytest.raises(UsageError, match="made is no folder of kernels, turbojet-host kernels"):
        write("nothing")


def test_kernels_of_another_version_are_not_packed(
    model: ModelConfig, tmp_path: Path, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_sets, "SOURCES", ("embedding",))
    made = build_kernels(tmp_path / "made", builds_for([87]), cache, Progress())
    monkeypatch.setattr(kernel_sets, "sources_sha256", lambda source: "changed")
    with pytest.raises(UsageError, match=r"embedding\.cubin in .*made is made of other sources"):
        write_package_kernels(tmp_path / "out", model, ORIN, str(made), cache, Progress())


def test_without_a_network_the_ways_out_are_named(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WHEELS, "11.8", "there is no such package==1")
    cache = KernelCache(tmp_path / "nvrtc", tmp_path / "cubins")
    with pytest.raises(DeviceError, match=r"pip could not fetch .*give --kernels a folder"):
        write_package_kernels(tmp_path / "out", model, ORIN, "auto", cache, Progress())


def test_other_kernels_make_another_package(
    tmp_path: Path, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_sets, "SOURCES", ("embedding",))
    made = build_kernels(tmp_path / "made", builds_for([110]), cache, Progress())
    prints = {kernels_fingerprint(source) for source in ("auto", "none", str(made))}
    assert len(prints) == 3
    assert kernels_fingerprint(str(made)) in prints  # the same for the same
    with monkeypatch.context() as changed:
        changed.setitem(WHEELS, "13.0", "another compiler")
        prints.add(kernels_fingerprint("auto"))
        assert len(prints) == 4
    with monkeypatch.context() as changed:
        changed.setattr(kernel_sets, "BUILDS", BUILDS[1:])
        prints.add(kernels_fingerprint("auto"))
        assert len(prints) == 5
    monkeypatch.setattr(kernel_sets, "sources_sha256", lambda source: "changed")
    assert kernels_fingerprint("auto") not in prints
