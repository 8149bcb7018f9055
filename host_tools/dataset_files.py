"""Reads documents out of text, JSON lines, parquet and zip files; nothing in them is executed."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import UsageError
from device_runtime.package_format.durable import replacing

TEXT_FIELDS = ("text", "sentence")
"""Where a record keeps its document, the first that is there."""

MAX_TEXT_CHARACTERS = 1 << 26
"""64 M characters of one data set are read; far more than any number of windows needs."""

MAX_LINE_BYTES = 1 << 26
ROWS_AT_ONCE = 1024


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a file, in order.

    ``.jsonl`` (also ``.json`` with one object a line, also ``.gz`` and ``.zst``) and ``.parquet``
    have one document per record, in the field ``text`` or ``sentence``; a file with any other name
    is one document of plain UTF-8 text.

    Raises:
        UsageError: the file is not there, damaged, or has no such field.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path} to read text from")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path)
    elif is_json_lines(path):
        with open_plain(path) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield parse_record(line, path, number)
    else:
        yield _read_text(path)


def is_json_lines(path: Path) -> bool:
    """Tell by its name whether a file holds one JSON object per line, packed or not."""
    kinds = [suffix.lower() for suffix in path.suffixes]
    if kinds and kinds[-1] in (".gz", ".zst"):
        kinds.pop()
    return bool(kinds) and kinds[-1] in (".jsonl", ".json")


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacked when its name ends in ``.gz`` or ``.zst``.

    Raises:
        UsageError: the packed data is damaged, found while reading.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path) as stream:
                yield cast(BinaryIO, stream)
        elif suffix == ".zst":
            import pyarrow

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                yield cast(BinaryIO, io.BufferedReader(stream))
        else:
            with path.open("rb") as stream:
                yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({error})") from error


def parse_record(line: bytes, path: Path, number: int) -> str:
    """Return the document of one line of JSON.

    Raises:
        UsageError: it is no JSON object with a text.
    """
    if len(line) > MAX_LINE_BYTES:
        raise UsageError(
            f"line {number} of {path} has {len(line)} bytes, expected at most {MAX_LINE_BYTES}"
        )
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"line {number} of {path} is no JSON") from error
    if isinstance(record, dict):
        for field in TEXT_FIELDS:
            if isinstance(record.get(field), str):
                return str(record[field])
    raise UsageError(f"line {number} of {path} has no text in {' or '.join(TEXT_FIELDS)}")


def read_zip_text(path: Path, member_end: str) -> str:
    """Return the text of the one member of a zip file whose name ends so.

    Raises:
        UsageError: the file is damaged, or has no such member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = [info for info in archive.infolist() if info.filename.endswith(member_end)]
            if len(found) != 1 or found[0].file_size > MAX_TEXT_CHARACTERS:
                raise UsageError(
                    f"{path} has {len(found)} members {member_end}, expected one of at most "
                    f"{MAX_TEXT_CHARACTERS} bytes"
                )
            return archive.read(found[0]).decode("utf-8")
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from error


class JsonLines:
    """A file of JSON lines with access to any line; memory holds where each one starts."""

    def __init__(self, path: Path) -> None:
        """Index a file; a packed one is first unpacked beside itself, once.

        Raises:
            UsageError: it cannot be read or holds no line.
        """
        self._path = _unpacked(path)
        ends = [0]
        with self._path.open("rb") as stream:
            for line in stream:
                ends.append(ends[-1] + len(line))
        self._ends: NDArray[np.int64] = np.array(ends, dtype=np.int64)
        if not len(self):
            raise UsageError(f"{path} holds no line")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        with self._path.open("rb") as stream:
            stream.seek(int(self._ends[index]))
            line = stream.read(int(self._ends[index + 1] - self._ends[index]))
        return parse_record(line, self._path, index + 1)


def _unpacked(path: Path) -> Path:
    if path.suffix.lower() not in (".gz", ".zst"):
        return path
    plain = path.with_suffix("")
    if not plain.is_file():
        with open_plain(path) as packed, replacing(plain) as stream:
            shutil.copyfileobj(packed, stream, 1 << 20)
    return plain


def _read_text(path: Path) -> str:
    with path.open("rb") as stream:
        # A character has at most four bytes; what is cut through at the end is left out.
        data = stream.read(4 * MAX_TEXT_CHARACTERS)
        is_whole = not stream.read(1)
    try:
        text = data.decode("utf-8", errors="strict" if is_whole else "ignore")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 at byte {error.start}, save it as UTF-8 text"
        ) from error
    # As Python's text mode reads a file; published figures on text files rest on that.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            field = next((name for name in TEXT_FIELDS if name in table.schema_arrow.names), None)
            if field is None:
                raise UsageError(
                    f"{path} has the columns {', '.join(table.schema_arrow.names)[:200]}, expected "
                    f"{' or '.join(TEXT_FIELDS)}"
                )
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[field]):
                yield from (
                    str(value) for value in batch.column(0).to_pylist() if value is not None
                )
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} is no whole parquet file ({error})") from error
