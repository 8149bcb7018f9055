"""Hostile and broken archives: each is a PackageError that leaves nothing behind."""

import contextlib
import dataclasses
import gzip
import io
import os
import random
import shutil
import tarfile
import unicodedata
import zlib
from unittest import mock

import pytest
from archive_samples import (
    CONFIG,
    WEIGHT,
    archive_of,
    member,
    members_of,
    small_package,
    tgz_of,
    tree,
    whole_package,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.archive_gzip import stored_member
from device_runtime.package_format.archive_names import LMDEPLOY_LINKS
from device_runtime.package_format.archive_reader import ArchiveLimits, extract_archive
from device_runtime.package_format.archive_staging import StagingTree

LINK = tarfile.SYMTYPE


@pytest.fixture
def place(tmp_path):
    """A folder to extract in, and a folder beside it that nobody may touch."""
    (tmp_path / "place").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    yield tmp_path / "place"
    assert tree(tmp_path / "precious") == {"file": b"mine"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["place", "precious"]


def refuse(data, place, message, **limits):
    with pytest.raises(PackageError, match=message):
        extract_archive(io.BytesIO(data), place / "out", limits=ArchiveLimits(**limits))
    assert os.listdir(place) == []


def plain(*extra, first=()):
    """A good plain workspace with hostile members before or after."""
    good = [member(f"ws/{CONFIG}", b"[llama]\n"), member(f"ws/{WEIGHT}", b"weights")]
    return tgz_of(*first, *good, *extra)


def test_the_good_part_of_the_hostile_archives_is_good(place) -> None:
    extract_archive(io.BytesIO(plain(member("ws/x", b"1"))), place / "out")
    assert (place / "out" / "x").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../precious/file", r"'\.\./precious/file' climbs out"),
        ("ws/../../precious/file", "climbs out"),
        ("ws/..", "climbs out"),
        ("/etc/passwd", "'/etc/passwd' is absolute"),
        ("//ws/x", "is absolute"),
        (".//ws/x", "is absolute"),
        ("ws//x", "is not normalised"),
        ("ws/./x", "is not normalised"),
        ("././ws/x", "is not normalised"),
        (".", "is not normalised"),
        ("./", "has 0 characters"),
        ("ws/x/", "is not normalised"),
        ("ws\\..\\x", "control character or a backslash"),
        ("ws/\x1b[2Jx", "control character or a backslash"),
        ("ws/a\nb", "control character or a backslash"),
        ("ws/" + "a/" * 130 + "b", "has 264 characters"),
        ("ws/" + "模" * 100, "a part of 300 bytes, expected at most 255"),
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_paths_that_leave_or_are_not_normalised(place, path, message, form) -> None:
    bad = member(path, b"x")
    for items in ([bad, *GOOD], [*GOOD, bad]):
        refuse(tgz_of(*items, form=form), place, message)


GOOD = [member(f"ws/{CONFIG}", b"[llama]\n"), member(f"ws/{WEIGHT}", b"weights")]


def test_an_empty_name_is_no_path(place) -> None:
    refuse(plain(member("", b"x")), place, "has 0 characters")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "is a symbolic link"),
        (tarfile.LNKTYPE, "is a hard link"),
        (tarfile.CHRTYPE, "is a character device"),
        (tarfile.BLKTYPE, "is a block device"),
        (tarfile.FIFOTYPE, "is a named pipe"),
        (tarfile.GNUTYPE_SPARSE, "is a sparse file"),
        (b"Z", "is of type 'Z'"),
    ],
)
def test_what_is_neither_file_nor_folder(place, kind, message) -> None:
    bad = member("ws/x", kind=kind, linkname="../../precious")
    refuse(plain(bad), place, message)
    refuse(plain(first=[bad]), place, message)
    # A file that would be written through the link.
    refuse(plain(bad, member("ws/x/file", b"evil")), place, message)


def test_a_long_link_target(place) -> None:
    refuse(plain(member("ws/x", kind=LINK, linkname="a/" * 80)), place, "link with a long target")


def test_only_the_exact_links_of_lmdeploy_are_left_out(place) -> None:
    for path, target in LMDEPLOY_LINKS.items():
        for bad in (
            member(f"ws/{path}", kind=LINK, linkname="../../precious"),
            member(f"ws/{path}", kind=LINK, linkname=f"{target}/"),
            member(f"ws/{path}x", kind=LINK, linkname=target),
            member(f"ws/x{path}", kind=LINK, linkname=target),
        ):
            refuse(plain(bad), place, "is a symbolic link")
        link = member(f"ws/{path}", kind=LINK, linkname=target)
        refuse(plain(link, member(f"ws/{path}/file", b"evil")), place, "as a file and as a folder")
        refuse(plain(link, link), place, "twice")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("ws/x", "ws/x", "holds 'ws/x' twice"),
        ("ws/x", "./ws/x", "holds 'ws/x' twice"),
        ("ws/x", "ws/X", "'ws/x' and 'ws/X', which differ only in case"),
        ("ws/x/a", "ws/X/b", "differ only in case"),
        ("ws/straße", "ws/STRASSE", "differ only in case"),
        (
            unicodedata.normalize("NFC", "ws/é"),
            unicodedata.normalize("NFD", "ws/é"),
            "Unicode form",
        ),
        ("ws/x", "ws/x/y", "holds 'ws/x' both as a file and as a folder"),
        ("ws/x/y", "ws/x", "holds 'ws/x' both as a file and as a folder"),
    ],
)
def test_names_that_collide(place, first, second, message) -> None:
    refuse(plain(member(first, b"1"), member(second, b"2")), place, message)


def test_a_folder_twice_or_as_a_file(place) -> None:
    folder = member("ws/x", kind=tarfile.DIRTYPE)
    refuse(plain(folder, folder), place, "holds 'ws/x/?' twice")
    refuse(plain(folder, member("ws/x", b"1")), place, "both as a file and as a folder")
    refuse(plain(member("ws/x", b"1"), folder), place, "both as a file and as a folder")


def test_bombs_stop_early(place) -> None:
    bomb = gzip.compress(bytes(40 << 20), 9)
    # 40 MB in 40 kB, thrice; tar sees one huge file.
    info, _ = member("ws/x")
    info.size = 120 << 20
    header = gzip.compress(info.tobuf(tarfile.GNU_FORMAT))
    refuse(header + bomb * 3, place, "over 50 times its size")
    # The same hidden behind the end of the archive, and in a name.
    refuse(plain() + bomb * 3, place, "zeros, expected at most|over 50 times")
    info.type = tarfile.GNUTYPE_LONGNAME
    refuse(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + bomb * 3, place, "125829120 bytes")


def test_a_bomb_against_the_manifest_stops_at_its_header(tmp_path) -> None:
    manifest, text = members_of(small_package(tmp_path / "p"))[-1]
    info, _ = member(f"ws/{WEIGHT}")
    info.size = 1 << 40
    tar = manifest.tobuf() + text + bytes(-len(text) % 512) + info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "place").mkdir()
    message = "has 1099511627776 bytes, manifest.json says 18"
    refuse(gzip.compress(tar), tmp_path / "place", message)


def test_caps_on_members_and_bytes(place) -> None:
    many = plain(*(member(f"ws/{i}") for i in range(20)))
    refuse(many, place, "more than 21 members", max_members=21)
    big = plain(member("ws/x", random.Random(0).randbytes(10_000)))
    refuse(big, place, "more than 9000 bytes", max_total_bytes=9000)
    extract_archive(io.BytesIO(many), place / "out", limits=ArchiveLimits(max_members=22))
    assert len(list((place / "out").iterdir())) == 21


def packed(tmp_path, package, form):
    """The package as our archive, or as a user's."""
    if form == "ours":
        return archive_of(package, tmp_path / "x.tgz")
    data = tgz_of(*members_of(package))
    if form == "gzip":
        return data
    deflater = zlib.compressobj(6, wbits=31)
    tar = gzip.decompress(data)
    half = len(tar) // 2
    first = deflater.compress(tar[:half]) + deflater.flush()
    return first + bytes(stored_member(tar[half:]))


@pytest.mark.parametrize("form", ["ours", "gzip", "mixed"])
def test_every_truncation_is_refused(tmp_path, form) -> None:
    package = whole_package(tmp_path / "p")
    data = packed(tmp_path, package, form)
    place = tmp_path / "place"
    place.mkdir()
    for size in {*range(0, len(data), 4096), *range(len(data) - 40, len(data))}:
        refuse(data[:size], place, "archive")
    extract_archive(io.BytesIO(data), place / "out")
    assert tree(place / "out") == tree(package)


def test_a_cut_between_members_is_refused(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    tar = gzip.decompress(archive_of(package, tmp_path / "x.tgz"))
    place = tmp_path / "place"
    place.mkdir()
    for size in range(512, len(tar), 512):
        refuse(bytes(stored_member(tar[:size])), place, "cut short")


@pytest.mark.parametrize(("form", "step"), [("ours", 1), ("gzip", 1), ("mixed", 29)])
@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_every_byte_flipped_is_refused_or_changes_nothing(tmp_path, form, step, mask) -> None:
    package = small_package(tmp_path / "p")
    data = bytearray(packed(tmp_path, package, form))
    original = tree(package)
    place = tmp_path / "place"
    place.mkdir()
    harmless = []
    for at in range(0, len(data), step):
        data[at] ^= mask
        try:
            extract_archive(io.BytesIO(data), place / "out")
        except PackageError:
            pass
        else:
            assert tree(place / "out") == original
            harmless.append(at)
            os.rename(place / "out", tmp_path / f"out{at}")
        assert os.listdir(place) == [], f"byte {at}"
        data[at] ^= mask
    # Time, XFL, OS and the extra field of each header; the unused bits before stored blocks.
    assert len(harmless) < 40


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_noise_in_the_tar_is_refused_or_changes_nothing_else(tmp_path_factory, draw) -> None:
    place = tmp_path_factory.getbasetemp() / "noise"
    place.mkdir(exist_ok=True)
    tar = bytearray(NOISE_TAR)
    for at in draw.draw(st.lists(st.integers(0, len(tar) - 1), min_size=1, max_size=4)):
        tar[at] = draw.draw(st.integers(0, 255))
    # The gzip layer is whole, so that the noise reaches the tar parser.
    with contextlib.suppress(PackageError), mock.patch.object(StagingTree, "sync"):
        extract_archive(io.BytesIO(stored_member(tar)), place / "out")
        shutil.rmtree(place / "out")
    assert os.listdir(place) == []


NOISE_TAR = gzip.decompress(
    tgz_of(
        member("ws", kind=tarfile.DIRTYPE),
        member("ws/" + "long/" * 30 + "x", b"long"),
        *GOOD,
        form=tarfile.PAX_FORMAT,
    )
)


def test_a_manifest_that_lies_about_sizes_and_names(tmp_path) -> None:
    package = small_package(tmp_path / "p")
    text = (package / names.MANIFEST).read_bytes()
    place = tmp_path / "place"
    place.mkdir()
    for old, new, message in (
        (WEIGHT.encode(), b"../../precious/file", "climbs out"),
        (WEIGHT.encode(), b"/etc/passwd", "absolute"),
        (b'"size_bytes": 18', b'"size_bytes": -1', "size_bytes -1"),
        (b'"tiny-1.0"', b'"../tiny"', "package name"),
        (b'"tiny-1.0"', b'"tiny/1.0"', "package name"),
    ):
        assert old in text
        (package / names.MANIFEST).write_bytes(text.replace(old, new))
        refuse(tgz_of(*members_of(package)), place, message)
        refuse(tgz_of(*members_of(package)[::-1]), place, message)


def test_limits_are_a_contract() -> None:
    assert dataclasses.asdict(ArchiveLimits()) == {
        "max_members": 100_000,
        "max_total_bytes": 1 << 42,
        "max_ratio": 50,
        "ratio_from_bytes": 64 << 20,
    }
