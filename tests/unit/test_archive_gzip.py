"""Gzip members: ours are stored blocks with a known size, others' are read as they come."""

import gzip
import io
import random
import zlib

import pytest

from device_runtime.errors import PackageError
from device_runtime.package_format.archive_gzip import GzipReader, stored_member


def read(data, num_threads=2):
    with GzipReader(io.BytesIO(data), num_threads) as reader:
        return b"".join(reader.chunks())


class Dribble(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def read(self, size=-1):
        return self._data.read(min(size, 7))


class BrokenDisk(io.RawIOBase):
    def read(self, size=-1):
        raise OSError(5, "Input/output error")


def test_a_stored_member_is_known_to_the_byte() -> None:
    # RFC 1952: magic, deflate, FEXTRA; time 0; XFL 0; OS 255; 12 bytes of extra field: "TJ", 8
    # bytes: 40 = 24 of header + 5 of block + 3 of data + 8 of trailer, and 3 of data. RFC 1951:
    # last stored block of 3 bytes, ~3 = 0xfffc. CRC-32 of "abc" is 0x352441c2.
    expected = (
        "1f8b0804 00000000 00ff 0c00 544a 0800 28000000 03000000 01 0300 fcff 616263 c2412435"
        "03000000"
    )
    assert stored_member(b"abc") == bytes.fromhex(expected)


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 200_000])
def test_any_gzip_reads_a_stored_member(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert gzip.decompress(stored_member(data)) == data


def test_members_come_back_in_order_whoever_made_them() -> None:
    parts = [random.Random(i).randbytes(50_000 + i) for i in range(12)]
    packed = [stored_member(p) if i % 3 else gzip.compress(p) for i, p in enumerate(parts)]
    for num_threads in (1, 2, 5):
        assert read(b"".join(packed), num_threads) == b"".join(parts)


def test_a_stream_that_gives_few_bytes_at_a_time_reads_the_same() -> None:
    packed = stored_member(b"first" * 99) + gzip.compress(b"second" * 99) + stored_member(b"third")
    with GzipReader(Dribble(packed), 2) as reader:
        assert b"".join(reader.chunks()) == b"first" * 99 + b"second" * 99 + b"third"
        assert reader.bytes_read == len(packed)


def test_what_compresses_a_thousandfold_comes_in_bounded_pieces() -> None:
    data = bytes(20 << 20)
    with GzipReader(io.BytesIO(gzip.compress(data)), 2) as reader:
        sizes = [len(chunk) for chunk in reader.chunks()]
    assert sum(sizes) == len(data)
    assert max(sizes) <= 4 << 20


def test_a_member_that_claims_to_unpack_to_more_than_64_mib_is_read_in_pieces() -> None:
    member = stored_member(b"abc")
    member[20:24] = (65 << 20).to_bytes(4, "little")
    assert read(bytes(member)) == b"abc"


@pytest.mark.parametrize("field", [16, 20])
def test_a_member_that_lies_about_its_size_is_damaged(field: int) -> None:
    member = stored_member(b"abc" * 100)
    member[field] -= 1
    with pytest.raises(PackageError, match="damaged in the gzip member at byte 0"):
        read(bytes(member) + stored_member(b"next"))


def test_a_member_that_claims_what_follows_it_is_damaged() -> None:
    first, second = stored_member(b"abc" * 100), stored_member(b"def" * 9)
    first[16:20] = (len(first) + len(second)).to_bytes(4, "little")
    for stream in (io.BytesIO(first + second), Dribble(bytes(first + second))):
        with (
            GzipReader(stream, 2) as reader,
            pytest.raises(PackageError, match="does not hold the 300 bytes its header says"),
        ):
            list(reader.chunks())


def test_a_damaged_member_is_named_by_its_place() -> None:
    first, second = stored_member(b"abc" * 100), stored_member(b"def" * 100)
    second[-10] ^= 1
    with pytest.raises(PackageError, match=f"gzip member at byte {len(first)} .*incorrect data"):
        read(bytes(first + second))
    plain = bytearray(gzip.compress(b"abc" * 100))
    plain[-6] ^= 1
    with pytest.raises(PackageError, match=r"gzip member at byte 0 .*incorrect data"):
        read(bytes(plain))


@pytest.mark.parametrize("pack", [stored_member, gzip.compress])
def test_every_cut_is_seen(pack) -> None:
    whole = bytes(pack(b"some data of a member"))
    for size in range(1, len(whole)):
        with pytest.raises(PackageError, match=r"cut short|starts with bytes"):
            read(whole[:size])


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(PackageError, match="empty, 0 bytes"):
        read(b"")


def test_data_after_the_last_member_is_refused() -> None:
    for extra in (b"\0", b"garbage that is longer than a header", bytes(512)):
        with pytest.raises(PackageError, match="goes on after its last gzip member, at byte 44"):
            read(bytes(stored_member(b"abcdefg")) + extra)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x28\xb5\x2f\xfd" + bytes(40), "is zstd, expected gzip; repack it with pigz"),
        (b"\xfd7zXZ\0" + bytes(40), "is xz, expected gzip"),
        (b"BZh91AY" + bytes(40), "is bzip2, expected gzip"),
        (b"PK\x03\x04" + bytes(40), "is zip, expected gzip"),
        (b"ws/triton_models" + bytes(500), "starts with bytes 7773, expected 1f8b"),
    ],
)
def test_other_formats_are_called_by_their_name(data: bytes, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        read(data)


def test_a_disk_that_fails_is_a_sentence() -> None:
    with (
        GzipReader(BrokenDisk(), 1) as reader,
        pytest.raises(PackageError, match="cannot be read after 0 bytes: Input/output error"),
    ):
        list(reader.chunks())


def test_every_level_of_zlib_is_read() -> None:
    data = random.Random(1).randbytes(1000) * 50
    for level in range(10):
        deflater = zlib.compressobj(level, wbits=31)
        assert read(deflater.compress(data) + deflater.flush()) == data
