"""SentencePiece models and rank files of a few hundred tokens, written by hand."""

import base64
import struct
from pathlib import Path

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2

BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
START = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
WORDS = [BLANK, *"helowrd中", f"{BLANK}h", "el", "lo", "llo", "hel", "hello", f"{BLANK}hello"]
# The earlier the better, as SentencePiece's trainer scores.
PIECES = [*START, *BYTES, *((word, -float(rank), NORMAL) for rank, word in enumerate(WORDS))]
MARKERS = [
    ("<eoa>", 0.0, USER_DEFINED),
    ("[UNUSED_TOKEN_145]", 0.0, USER_DEFINED),
    ("[UNUSED_TOKEN_146]", 0.0, USER_DEFINED),
]


def varint(value: int) -> bytes:
    head = b""
    while value > 127:
        head += bytes([value & 127 | 128])
        value >>= 7
    return head + bytes([value])


def integer(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def content(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(spelling: str, score: float, kind: int) -> bytes:
    text = content(1, spelling.encode()) + b"\x15" + struct.pack("<f", score)
    return content(1, text + (integer(3, kind) if kind != NORMAL else b""))


def trainer(algorithm: int = BPE, has_byte_fallback: bool = True, more: bytes = b"") -> bytes:
    return content(2, integer(3, algorithm) + integer(35, has_byte_fallback) + more)


def normalizer(
    has_prefix: bool = False, removes: bool = False, more: bytes = b"", number: int = 3
) -> bytes:
    rules = content(1, b"identity") + integer(3, has_prefix) + integer(4, removes) + more
    return content(number, rules)


def model(pieces=None, *parts: bytes) -> bytes:
    """The bytes of tokenizer.model; ``parts`` replace the usual trainer and normalizer."""
    rows = [*PIECES, *MARKERS] if pieces is None else pieces
    return b"".join(piece(*row) for row in rows) + b"".join(parts or (trainer(), normalizer()))


def ranks(words=(b"he", b"ll", b"llo", b"hello", b" hello")) -> bytes:
    """The bytes of qwen.tiktoken: every byte, then ``words``."""
    tokens = [*(bytes([byte]) for byte in range(256)), *words]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def write_model(folder: Path, pieces=None, *parts: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model(pieces, *parts))
    return folder


def write_ranks(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qwen.tiktoken").write_bytes(ranks(**changes))
    return folder
