"""Tar headers: ours are plain ustar, users' may be GNU or pax, and nothing else gets through."""

import io
import random
import tarfile

import pytest
from archive_samples import member, tar_of

from device_runtime.errors import PackageError
from device_runtime.package_format.archive_tar import TarMember, TarReader
from device_runtime.package_format.archive_ustar import END_OF_ARCHIVE, file_header, padding_bytes

USTAR, GNU, PAX = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT


def chunks(data, size=700):
    return iter([data[at : at + size] for at in range(0, len(data), size)])


def read(data, size=700):
    """All members with their data."""
    reader = TarReader(chunks(data, size))
    found = []
    while (item := reader.next_member()) is not None:
        found.append((item, b"".join(reader.data())))
    return found


def block(data, at, value):
    """The tar with bytes of its first header replaced and the checksum made right again."""
    header = bytearray(data[:512])
    header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def test_our_header_is_what_tarfile_writes() -> None:
    for path, size in (("a/b", 5), ("d" * 90 + "/" + "f" * 95, 0), ("x" * 100, 8**11 - 1)):
        info = tarfile.TarInfo(path)
        info.size, info.mtime, info.mode = size, 946_684_800, 0o644
        expected = bytearray(info.tobuf(USTAR))
        # tarfile leaves the device numbers of a regular file as octal zeros or empty, by version.
        ours = bytearray(file_header(path, size))
        for header in (expected, ours):
            header[148:156] = header[329:345] = b""
        assert ours == expected
        assert tarfile.TarInfo.frombuf(file_header(path, size), "utf-8", "strict").name == path


@pytest.mark.parametrize("path", ["x" * 101, "a/" + "x" * 101, "d" * 156 + "/" + "x" * 99])
def test_a_path_that_ustar_cannot_hold_is_refused(path: str) -> None:
    with pytest.raises(PackageError, match="no slash that splits it into at most 155 and 100"):
        file_header(path, 0)


def test_a_file_of_8_gib_is_refused() -> None:
    with pytest.raises(PackageError, match=r"8589934592 bytes, an archive holds .* 8589934591"):
        file_header("a", 8**11)


@pytest.mark.parametrize("form", [USTAR, GNU, PAX])
@pytest.mark.parametrize("size", [1, 512, 700, 1 << 20])
def test_members_of_every_format_are_read(form: int, size: int) -> None:
    long_name = "folder/" * 20 + "模型-" + "n" * (60 if form == USTAR else 150)
    data = random.Random(1).randbytes(3000)
    tar = tar_of(
        member("ws", kind=tarfile.DIRTYPE),
        member("ws/a", data),
        member(long_name, b"x" * 512),
        member("ws/empty"),
        member("ws/link", kind=tarfile.SYMTYPE, linkname="../a"),
        form=form,
    )
    assert read(tar, size) == [
        (TarMember("ws/", 0, "folder"), b""),
        (TarMember("ws/a", 3000, "file"), data),
        (TarMember(long_name, 512, "file"), b"x" * 512),
        (TarMember("ws/empty", 0, "file"), b""),
        (TarMember("ws/link", 0, "symlink", "../a"), b""),
    ]


def test_a_long_name_that_the_header_cuts_inside_of_a_character_is_read() -> None:
    name = "n" * 99 + "模" * 30
    assert read(tar_of(member(name, b"x"), form=GNU))[0][0].path == name


def test_data_that_nobody_takes_is_skipped() -> None:
    reader = TarReader(chunks(tar_of(member("a", b"1" * 2000), member("b", b"2"))))
    first = reader.next_member()
    next(reader.data())
    second = reader.next_member()
    assert first is not None and second is not None
    assert (first.path, second.path) == ("a", "b")


def test_pax_sizes_and_times_are_understood() -> None:
    info, data = member("a", b"x" * 600)
    info.pax_headers = {"mtime": "1.5", "SCHILY.xattr.user.x": "\udcff", "size": "600"}
    assert read(tar_of((info, data), form=PAX)) == [(TarMember("a", 600, "file"), data)]


def test_a_global_pax_header_may_hold_a_comment_only() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=PAX, pax_headers={"comment": "x"}) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    assert read(buffer.getvalue()) == [(TarMember("a", 0, "file"), b"")]
    for key in ("path", "size", "linkpath", "GNU.sparse.size"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=PAX, pax_headers={key: "1"}) as tar:
            tar.addfile(tarfile.TarInfo("a"))
        with pytest.raises(PackageError, match=f"sets '{key}' for all members"):
            read(buffer.getvalue())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.LNKTYPE, "'x' is a hard link"),
        (tarfile.CHRTYPE, "'x' is a character device"),
        (tarfile.BLKTYPE, "'x' is a block device"),
        (tarfile.FIFOTYPE, "'x' is a named pipe"),
        (tarfile.CONTTYPE, "'x' is a contiguous file"),
        (tarfile.GNUTYPE_SPARSE, "'x' is a sparse file"),
        (b"V", "'x' is of type 'V'"),
    ],
)
def test_other_kinds_of_members_are_refused_by_name(kind: bytes, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        read(tar_of(member("x", kind=kind, linkname="y")))


def test_sparse_files_of_pax_are_refused() -> None:
    info, data = member("x", b"abc")
    info.pax_headers = {"GNU.sparse.major": "1"}
    with pytest.raises(PackageError, match="'x' is a sparse file, pack it without --sparse"):
        read(tar_of((info, data), form=PAX))


def test_folders_and_links_have_no_data() -> None:
    for kind, name in ((b"5", "folder"), (b"2", "symlink")):
        tar = block(tar_of(member("x", b"abc")), 156, kind)
        with pytest.raises(PackageError, match=f"'x' is a {name} of 3 bytes, expected 0"):
            read(tar)


def test_every_cut_of_the_stream_is_seen() -> None:
    tar = tar_of(member("a", b"x" * 600))[: 512 + 1024 + 1024]
    assert len(read(tar)) == 1
    for size in range(0, len(tar), 100):
        with pytest.raises(PackageError, match="cut short, its tar stream ends without"):
            read(tar[:size])


def test_nothing_but_padding_follows_the_end() -> None:
    header = file_header("a", 0)
    assert read(header + END_OF_ARCHIVE + bytes(8 << 20))
    with pytest.raises(PackageError, match="after a block of zeros"):
        read(header + bytes(512) + header + END_OF_ARCHIVE)
    with pytest.raises(PackageError, match="after its end with data that is not zero"):
        read(header + END_OF_ARCHIVE + bytes(600) + b"x")
    with pytest.raises(PackageError, match=r"with \d+ zeros, expected at most 8388608"):
        read(header + END_OF_ARCHIVE + bytes((8 << 20) + 1))


def test_damaged_headers_are_sentences() -> None:
    tar = tar_of(member("a", b"abc"))
    for data, message in (
        (tar[:257] + b"nope!" + tar[262:], "without a ustar signature, 'nope!  "),
        (b"b" + tar[1:], r"checksum \d+, it says \d+"),
        (block(tar, 124, b"12x45678901"), "'12x45678901.*' where a tar header has an octal"),
        (block(tar, 124, bytes(12)), "where a tar header has an octal number"),
        (block(tar, 124, b"\x80" + bytes(4) + b"\xff" * 7), "member of 72057594037927935 bytes"),
        (block(tar, 124, b"\xff" * 12), "where a tar header has an octal number"),
        (block(tar, 0, b"\xff\xfe"), r"a name that is not UTF-8: '\\xff\\xfe'"),
    ):
        with pytest.raises(PackageError, match=message):
            read(data)


def test_a_size_in_base_256_is_read() -> None:
    tar = block(tar_of(member("a", b"abc")), 124, b"\x80" + (3).to_bytes(11, "big"))
    assert read(tar) == [(TarMember("a", 3, "file"), b"abc")]


def extended(kind, data):
    """One extended header with its data, by hand."""
    header = block(file_header("ext", len(data)), 156, kind)
    return header + data + bytes(padding_bytes(len(data)))


def test_extended_headers_are_checked() -> None:
    plain = file_header("a", 0) + END_OF_ARCHIVE
    path = b"11 path=ab\n"
    for data, message in (
        (extended(b"x", path) + END_OF_ARCHIVE, "ends after an extended header"),
        (extended(b"x", path) + extended(b"x", path) + plain, "two extended headers"),
        (extended(b"L", b"ab") + extended(b"L", b"ab") + plain, "two extended headers"),
        (extended(b"x", b"99 path=ab\n") + plain, "damaged pax header"),
        (extended(b"x", b"xx path=ab\n") + plain, "damaged pax header"),
        (extended(b"x", b"0 path=ab\n") + plain, "damaged pax header"),
        (extended(b"x", b"7 path\n") + plain, "damaged pax header"),
        (extended(b"x", b"") + plain, "extended header of 0 bytes"),
        (extended(b"L", b"n" * 65537) + plain, "extended header of 65537 bytes, .* 65536"),
        (extended(b"x", b"10 size=x\n") + plain, "pax size of 'x', expected a number"),
        (
            extended(b"x", b"28 size=" + b"9" * 19 + b"\n") + plain,
            "a member of 9999999999999999999",
        ),
        (extended(b"x", b"10 size=\xc2\n") + plain, "not UTF-8"),
    ):
        with pytest.raises(PackageError, match=message):
            read(data)
    assert read(extended(b"x", path) + plain)[0][0].path == "ab"
