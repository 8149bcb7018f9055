"""GGUF files that lie or are damaged end in one sentence, quickly and with nothing written."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf as tiny

from device_runtime.errors import PackageError
from host_tools.fetch import fetch
from host_tools.fetch.gguf_header import GgufHeader, read_header
from host_tools.fetch.gguf_metadata import Metadata
from host_tools.fetch.gguf_model import describe_model
from host_tools.fetch.gguf_tokenizer import rebuild_tokenizer

UINT8, UINT32, STRING, ARRAY, UINT64 = 0, 4, 8, 9, 10


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def tensor(name: str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    counts = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + counts + struct.pack("<IQ", kind, offset)


def file_of(
    path: Path,
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    data: bytes = b"",
) -> Path:
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    whole = head + b"".join(keys) + b"".join(tensors)
    path.write_bytes(whole + b"\0" * (-len(whole) % 32) + data)
    return path


def test_our_reader_agrees_with_the_library(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    kind = gguf.GGMLQuantizationType.Q8_0
    tiny.write_gguf(path, tiny.random_model("llama"), kind=kind)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents(), name
    assert len(ours.metadata) == len(theirs.fields) - 3
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for found in theirs.tensors:
        mine = ours.tensors[found.name]
        assert mine.shape == tuple(reversed(found.shape.tolist()))
        assert (mine.kind, mine.offset) == (found.tensor_type, found.data_offset)
        assert mine.num_bytes == found.n_bytes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b""), "needs 4 bytes at byte 0, but 0 are left"),
        (lambda p: p.write_bytes(b"PK\3\4" * 9), "is no GGUF file, it does not start with 'GGUF'"),
        (lambda p: file_of(p, version=1), "has GGUF version 1, expected 2 or 3"),
        (
            lambda p: file_of(p, version=0x03000000),
            r"version 50331648 \(big endian\), expected 2 or 3 in little endian",
        ),
        (lambda p: file_of(p, num_keys=1 << 60), "claims 1152921504606846976 metadata keys"),
        (lambda p: file_of(p, num_tensors=1 << 40), "claims 1099511627776 tensors, expected at"),
        (lambda p: file_of(p, num_keys=9), "needs .* bytes at byte .*, but .* are left"),
        (
            lambda p: file_of(p, (struct.pack("<Q", 1 << 50),)),
            "a metadata key of .* claims 1125899906842624 bytes",
        ),
        (lambda p: file_of(p, (struct.pack("<Q", 5000),)), "needs 5000 bytes at byte 32"),
        (
            lambda p: file_of(p, (struct.pack("<Q", 2) + b"\xff\xfe",)),
            "a metadata key of .* is not UTF-8",
        ),
        (lambda p: file_of(p, (key("a", 99, b""),)), "'a' of .* has the unknown value type 99"),
        (
            lambda p: file_of(p, (key("a", UINT8, b"\1"), key("a", UINT8, b"\1"))),
            "has the metadata key 'a' twice",
        ),
        (
            lambda p: file_of(p, (key("a", ARRAY, struct.pack("<IQ", UINT8, 1 << 61)),)),
            "array 'a' of .* claims 2305843009213693952 elements",
        ),
        (
            lambda p: file_of(p, (key("a", ARRAY, struct.pack("<IQ", UINT64, 1 << 20)),)),
            "needs 8388608 bytes",
        ),
        (
            lambda p: file_of(p, (key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 20)),)),
            "needs 8 bytes at byte",
        ),
        (
            lambda p: file_of(p, (key("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)),
            "'a' of .* is an array of arrays",
        ),
        (
            lambda p: file_of(p, (key("general.alignment", UINT32, struct.pack("<I", 24)),)),
            "has alignment 24, expected a power of two",
        ),
        (
            lambda p: file_of(p, (key("general.alignment", UINT32, struct.pack("<I", 1 << 30)),)),
            "has alignment 1073741824, expected a power of two up to 65536",
        ),
        (lambda p: file_of(p, (), (tensor("t", ()),)), "'t' of .* has 0 dimensions"),
        (lambda p: file_of(p, (), (tensor("t", (1,) * 5),)), "'t' of .* has 5 dimensions"),
        (lambda p: file_of(p, (), (tensor("t", (4, 0)),)), "tensor 't' of .* is empty"),
        (lambda p: file_of(p, (), (tensor("t", (4,), 77),)), "'t' of .* has the unknown type 77"),
        (
            lambda p: file_of(p, (), (tensor("t", (33,), 2),)),
            "rows of 33 values, expected a multiple of 32 for Q4_0",
        ),
        (
            lambda p: file_of(p, (), (tensor("t", (8,)),), data=b"\0" * 31),
            r"'t' of .* ends at byte 96, but the file has 95",
        ),
        (
            lambda p: file_of(p, (), (tensor("t", (1 << 62, 1 << 62)),)),
            "ends at byte .*, but the file has",
        ),
        (
            lambda p: file_of(p, (), (tensor("t", (8,), offset=1 << 63),)),
            "ends at byte 9223372036854775904, but the file has",
        ),
        (
            lambda p: file_of(p, (), (tensor("t", (1,)), tensor("t", (1,))), data=b"\0" * 64),
            "has the tensor 't' twice",
        ),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "m.gguf"
    make(path)
    started = time.monotonic()
    with pytest.raises(PackageError, match=message):
        read_header(path)
    assert time.monotonic() - started < 2


def read_all(path: Path) -> GgufHeader:
    header = read_header(path)
    model = describe_model(header)
    rebuild_tokenizer(Metadata(header), model.vocab_size)
    return header


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "whole.gguf", tiny.random_model("llama"))
    whole = (tmp_path / "whole.gguf").read_bytes()
    first = min(t.offset for t in read_header(tmp_path / "whole.gguf").tensors.values())
    cuts = [*range(600), *range(600, first, 97), *range(first, len(whole), 4001), len(whole) - 1]
    for cut in cuts:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:cut])
        with pytest.raises(PackageError):
            read_header(path)


def test_a_flipped_byte_of_the_header_is_a_sentence_or_harmless(tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "whole.gguf", tiny.random_model("llama"))
    whole = bytearray((tmp_path / "whole.gguf").read_bytes())
    first = min(t.offset for t in read_header(tmp_path / "whole.gguf").tensors.values())
    refused = 0
    for place in range(0, first, 9):
        changed = whole.copy()
        changed[place] ^= 0xFF
        (tmp_path / "changed.gguf").write_bytes(changed)
        try:
            read_all(tmp_path / "changed.gguf")
        except PackageError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


MODEL = tiny.random_model("llama")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "m.gguf is a mixture of 8 experts, only dense models run"),
        ({"general.type": "adapter"}, "m.gguf holds a 'adapter', expected a whole model"),
        ({"split.count": 3}, "m.gguf is one of 3 parts of a split GGUF, join them"),
        ({"llama.block_count": 1 << 23}, "claims 8388608 layers, but holds 21 tensors in all"),
        ({"llama.block_count": 3}, "m.gguf has no tensor blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, r"has 9 tensors such as 'blk.1.attn_k.weight' that no"),
        ({"llama.block_count": "two"}, "llama.block_count of m.gguf is 'two', expected an integer"),
        ({"llama.block_count": 0}, "llama.block_count of m.gguf is 0, expected an integer from 1"),
        ({"llama.block_count": None}, "m.gguf has no llama.block_count, expected an integer"),
        (
            {"llama.embedding_length": 128, "llama.attention.key_length": 16},
            r"token_embd.weight of m.gguf has shape \[280, 64\], expected \[280, 128\]",
        ),
        ({"llama.rope.dimension_count": 8}, "dimension_count of m.gguf is 8, expected the head"),
        (
            {
                "llama.attention.key_length": 15,
                "llama.attention.value_length": 15,
                "llama.rope.dimension_count": 15,
            },
            "has 4 heads of 15 over 2 kv heads, expected an even head size",
        ),
        ({"llama.attention.head_count_kv": 3}, "4 heads of 16 over 3 kv heads"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its positions by 'yarn', expected none"),
        (
            {"llama.attention.layer_norm_rms_epsilon": -1.0},
            "layer_norm_rms_epsilon of m.gguf is -1.0, expected a positive number",
        ),
        (
            {"llama.attention.layer_norm_rms_epsilon": "small"},
            "layer_norm_rms_epsilon of m.gguf is 'small', expected a number",
        ),
        ({"tokenizer.ggml.eot_token_id": 999}, "eot_token_id of m.gguf is 999, expected a token"),
    ],
)
def test_metadata_that_cannot_be_is_refused(
    tmp_path: Path, metadata: dict[str, object], message: str
) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", MODEL, metadata=metadata)
    with pytest.raises(PackageError, match=message):
        fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"token_embd.weight": None}, "m.gguf has no tensor token_embd.weight"),
        ({"blk.0.ffn_up.weight": None}, "m.gguf has no tensor blk.0.ffn_up.weight"),
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "no tensor blk.0.attn_k.bias"),
        (
            {"blk.0.ffn_up.weight": np.zeros((95, 64), np.float32)},
            r"blk.0.ffn_up.weight of m.gguf has shape \[95, 64\], expected \[96, 64\]",
        ),
        (
            {"blk.0.attn_norm.weight": np.zeros(64, np.int8)},
            "'blk.0.attn_norm.weight' of m.gguf is stored as I8, which cannot be dequantized",
        ),
        (
            {"rope_freqs.weight": np.full(8, 3, np.float32)},
            "rope_freqs.weight of m.gguf is not Llama 3.1's rule with a factor of 8, 32, 16, 64",
        ),
        (
            {"rope_freqs.weight": np.ones(9, np.float32)},
            r"rope_freqs.weight of m.gguf is F32 of shape \[9\], expected F32 of \[8\]",
        ),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray | None], message: str
) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", MODEL, tensors=tensors)
    with pytest.raises(PackageError, match=message):
        fetch(str(tmp_path / "m.gguf"), tmp_path / "out")


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", MODEL, "gemma2")
    with pytest.raises(
        PackageError,
        match="architecture 'gemma2', expected one of llama, internlm2, qwen2, qwen3",
    ):
        fetch(str(tmp_path / "m.gguf"), tmp_path / "out")


TOKENS = tiny.Vocabulary().tokens


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (tiny.Vocabulary(model="bert"), "a tokenizer of kind 'bert', expected gpt2"),
        (tiny.Vocabulary(pre="tekken"), "the pre-tokenizer 'tekken', expected one of default, gpt"),
        (tiny.Vocabulary(tokens=TOKENS[:3], types=[3, 3, 3]), "merges 'h e', which its vocabulary"),
        (tiny.Vocabulary(types=[1, 2]), "token_type of m.gguf has 2 elements, expected 266"),
        (
            tiny.Vocabulary(tokens=[*TOKENS[:-1], "he"]),
            "m.gguf has 266 tokens, but 265 different ones",
        ),
        (
            tiny.Vocabulary(tokens=[*TOKENS, *map(str, range(100, 120))], types=[1] * 286),
            "m.gguf has 286 tokens for 280 rows of its embedding, expected 1 to 280",
        ),
        (
            tiny.Vocabulary(tokens=[*TOKENS[:-1], "x" * 5000]),
            "has a token of 5000 characters, expected at most 4096",
        ),
        (tiny.Vocabulary(merges=["he l"]), "merges 'he l', which its vocabulary does not hold"),
        (tiny.Vocabulary(merges=[]), "m.gguf has no tokenizer.ggml.merges, expected an array of"),
        (
            tiny.Vocabulary(model="llama", scores=[0.0] * 5),
            "tokenizer.ggml.scores of m.gguf has 5 elements, expected 266",
        ),
        (
            tiny.Vocabulary(model="llama", scores=[0.0] * 266, ids={"bos": 1}),
            "m.gguf names no unknown token, SentencePiece needs one",
        ),
    ],
)
def test_vocabularies_that_cannot_be_are_refused(
    tmp_path: Path, vocabulary: tiny.Vocabulary, message: str
) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", MODEL, vocabulary=vocabulary)
    with pytest.raises(PackageError, match=message):
        fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.name": 5, "tokenizer.chat_template": None}, ""),
        ({"general.type": 5}, "general.type of m.gguf is 5, expected a string"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token of m.gguf is 1, expected a boolean"),
        (
            {"tokenizer.ggml.tokens": [1, 2]},
            r"tokens of m.gguf is \[1, 2\], expected an array of s",
        ),
        (
            {"tokenizer.ggml.token_type": ["a"]},
            r"token_type of m.gguf is \['a'\], expected an array of numbers",
        ),
    ],
)
def test_metadata_of_the_wrong_type_is_refused(
    tmp_path: Path, metadata: dict[str, object], message: str
) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", MODEL)
    header = read_header(tmp_path / "m.gguf")
    merged = {k: v for k, v in {**header.metadata, **metadata}.items() if v is not None}
    changed = GgufHeader(header.path, merged, header.tensors)  # type: ignore[arg-type]
    if not message:
        assert rebuild_tokenizer(Metadata(changed), describe_model(changed).vocab_size)
        return
    with pytest.raises(PackageError, match=message):
        rebuild_tokenizer(Metadata(changed), describe_model(changed).vocab_size)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"gone.gguf cannot be read \(No such file"):
        read_header(tmp_path / "gone.gguf")
