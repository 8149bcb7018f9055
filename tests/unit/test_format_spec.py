"""SPEC.md states the format in tables; each is compared with the code here."""

import dataclasses
import gzip
import io
import itertools
import re
import struct
import tarfile
import time
import types
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from format_samples import FP16, INT4, write_workspace

from device_runtime import package_format
from device_runtime.package_format import fusion, int4, names, rotary
from device_runtime.package_format.archive_gzip import MEMBER_DATA_BYTES
from device_runtime.package_format.archive_reader import ArchiveLimits
from device_runtime.package_format.archive_writer import write_archive
from device_runtime.package_format.config_ini import TurboMindConfig
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.manifest import FORMAT_VERSION, MAX_MANIFEST_BYTES, Manifest
from device_runtime.package_format.tensors import tensor_specs

SPEC = (Path(package_format.__file__).parent / "SPEC.md").read_text(encoding="utf-8")


def rows_of(*header):
    """The rows of the one table with this header, cells without blanks and backquotes."""
    lines = SPEC.splitlines()
    head = f"| {' | '.join(header)} |"
    assert lines.count(head) == 1, head
    start = lines.index(head) + 2
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [tuple(c.strip().strip("`") for c in line[1:-1].split("|")) for line in table]


def test_the_page_is_about_this_version():
    assert SPEC.startswith(f"# The Turbojet package format, version {FORMAT_VERSION}\n")
    assert f"a version above {FORMAT_VERSION} asks for a newer turbojet" in SPEC
    assert f"at most {MAX_MANIFEST_BYTES >> 20} MiB" in SPEC


def test_file_names_are_those_of_the_code():
    assert [path for path, _, _ in rows_of("path", "content", "module")] == [
        names.MANIFEST,
        names.CONFIG_PATH,
        names.weight_path("TENSOR"),
        *map(
            names.tokenizer_path,
            (
                names.TOKENIZER_JSON,
                names.TOKENIZER_CONFIG,
                names.SPECIAL_TOKENS_MAP,
                names.GENERATION_CONFIG,
                names.TOKENIZER_MODEL,
                names.TOKENIZER_TIKTOKEN,
            ),
        ),
        f"{names.KERNELS_DIR}/",
    ]
    assert f"at most {names.MAX_PATH_CHARACTERS} characters" in SPEC


def test_modules_it_names_exist():
    folder = Path(package_format.__file__).parent
    for module in set(re.findall(r"`(\w+\.py)`", SPEC)):
        assert (folder / module).is_file(), module


DTYPES = {"fp16": "<f2", "int8": "|i1", "uint32": "<u4", "float32": "<f4"}

MODELS = [
    dataclasses.replace(base, num_attention_heads=4, num_kv_heads=2, vocab_size=71, **changes)
    for base in (INT4, FP16, dataclasses.replace(FP16, weight_type="bf16"))
    for changes in (
        {},
        {"tie_word_embeddings": True},
        {"head_type": "int8"},
        {"head_type": "int8", "tie_word_embeddings": True},
        {"has_attention_bias": True, "intermediate_size": 192},
        {"has_qk_norm": True, "head_dim": 64},
        {"tensor_para_size": 2, "has_attention_bias": True, "intermediate_size": 128},
    )
]
MODELS += [
    dataclasses.replace(model, fp16_linears=("layers.0.attention.wo", "layers.1.feed_forward.w13"))
    for model in MODELS
    if model.weight_type == "int4"
]


def tensors_of_the_table(model, kv_scales):
    ranks = model.tensor_para_size
    symbols = {
        "hidden": model.hidden_size,
        "I": model.intermediate_size,
        "H": model.num_attention_heads,
        "HK": model.num_kv_heads,
        "D": model.head_dim,
        "Vp": -(-model.vocab_size // ranks) * ranks,
        "g": model.group_size,
        "tp": ranks,
    }
    facts = {
        "always": True,
        "tied": model.tie_word_embeddings,
        "bias": model.has_attention_bias,
        "qk_norm": model.has_qk_norm,
        "int8_head": model.head_type == "int8",
        "kv_scales": kv_scales,
    }
    dtypes = DTYPES | {"float": "<u2" if model.weight_type == "bf16" else "<f2"}
    found = {}
    for file, elements, shape, split, condition in rows_of(
        "file", "elements", "shape", "split", "present when"
    ):
        sizes = tuple(
            eval(size.replace("/", "//"), {}, symbols)
            for size in shape.split(",")
            if model.group_size or "g" not in size
        )
        layers = range(model.num_hidden_layers) if ".L." in file else [None]
        for layer, rank in itertools.product(layers, range(ranks) if ".R." in file else [None]):
            if not eval(condition, {}, facts | {"int4": is_int4(model, file, layer)}):
                continue
            name = file.replace(".L.", f".{layer}.").replace(".R.", f".{rank}.")
            found[name] = (dtypes[elements], sizes, split)
    return found


def is_int4(model, file, layer):
    """What the page says under the table about `int4`."""
    unit = ".".join(file.split(".")[:4]).replace(".L.", f".{layer}.")
    unit = re.sub("w[13]$", "w13", unit)
    return model.weight_type == "int4" and unit not in model.fp16_linears


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kv_scales", [False, True])
def test_the_weight_files_are_those_of_the_code(model, kv_scales):
    specs = tensor_specs(model, has_kv_scales=kv_scales)
    coded = {spec.name: (spec.dtype.str, spec.shape, spec.split) for spec in specs}
    assert len(coded) == len(specs)
    assert coded == tensors_of_the_table(model, kv_scales)


def hexadecimal(value, digits=8):
    return f"0x{int(value):0{digits}x}"


def numbers(array):
    return " ".join(str(value) for value in array)


def eight_codes():
    codes = np.zeros((32, 32), np.uint8)
    for code, (k, m) in enumerate(itertools.product((0, 8), (0, 8)), start=1):
        codes[k, m], codes[k + 1, m] = code, code + 4
    return hexadecimal(int4.pack_words(codes)[0])


def last_code():
    codes = np.zeros((64, 64), np.uint8)
    codes[63, 63] = 15
    words = int4.pack_words(codes)
    (index,) = np.flatnonzero(words)
    return f"{index}: {hexadecimal(words[index])}"


def scale_word(zero, scale):
    scales, zeros = np.array([[scale]], np.float16), np.array([[zero]], np.uint8)
    return hexadecimal(int4.pack_scales_zeros(scales, zeros)[0, 0])


def weight_bits(code, scale_bits):
    weights = int4.dequantize(
        np.array([[code]], np.uint8),
        np.array([[0]], np.uint8),
        np.array([[scale_bits]], np.uint16).view(np.float16),
        group_size=1,
    )
    return hexadecimal(weights.view(np.uint16)[0, 0], 4)


def test_the_check_values_are_those_of_the_code():
    eight = np.arange(8, dtype=np.uint8)
    qkv = fusion.fuse_qkv(np.arange(8), np.arange(10, 14), np.arange(20, 24), ranks=2)
    coded = [
        eight_codes(),
        last_code(),
        scale_word(8, 1.0),
        scale_word(15, -0.5),
        hexadecimal(int4.pack_awq(eight[None])[0, 0]),
        weight_bits(3, 0x3C01),
        weight_bits(15, 0x03FF),
        numbers(rotary.to_pairs(eight, 8)),
        numbers(qkv[1]),
        numbers(fusion.fuse_w13(np.array([1, 2]), np.array([10, 20]))),
        KvScale(1.0, 2.0, 0.5, -1.0).to_bytes().hex(),
    ]
    assert [value for _, value in rows_of("check", "value")] == coded


def test_the_nibble_order_of_awq_is_that_of_the_code():
    assert f"`C = {int4.AWQ_COLUMN_OF_NIBBLE}`" in SPEC


def test_the_config_keys_are_those_of_the_code():
    coded = [
        (f.name, f.type, "" if f.default is dataclasses.MISSING else str(f.default))
        for f in dataclasses.fields(TurboMindConfig)
    ]
    assert rows_of("key", "type", "default") == coded


JSON_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def keys_of(record, prefix=""):
    for key, hint in get_type_hints(record).items():
        yield from keys_of_hint(hint, f"{prefix}{key}")


def keys_of_hint(hint, key):
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        yield from keys_of(hint, f"{key}.")
    elif origin is tuple:
        yield from keys_of_hint(get_args(hint)[0], f"{key}[]")
    elif origin is Literal:
        *first, last = get_args(hint)
        yield key, f"{', '.join(first)} or {last}"
    elif origin is types.UnionType:
        inner = get_args(hint)[0]
        yield key, f"{JSON_NAMES.get(inner, 'object')} or null"
        if dataclasses.is_dataclass(inner):
            yield from keys_of(inner, f"{key}.")
    else:
        yield key, JSON_NAMES[hint]


def test_the_manifest_keys_are_those_of_the_code():
    assert rows_of("key", "type") == list(keys_of(Manifest))


def test_the_limits_of_an_archive_are_those_of_the_code():
    coded = [(name, str(value)) for name, value in dataclasses.asdict(ArchiveLimits()).items()]
    assert rows_of("limit", "value") == coded


def test_the_members_of_an_archive_are_those_of_the_code(tmp_path):
    root = tmp_path / "package"
    root.mkdir()
    write_workspace(root, INT4, is_sealed=True)
    data = write_archive(root, tmp_path / "tiny.tgz").path.read_bytes()
    # RFC 1952: magic, deflate, FEXTRA; time 0, no flags, system 255; 12 bytes of extra field:
    # "TJ", 8 bytes, the sizes. The package is smaller than 4 MiB, so there is one member.
    tar = gzip.decompress(data)
    sizes = struct.pack("<II", len(data), len(tar))
    assert data[:24] == bytes.fromhex("1f8b0804 00000000 00ff 0c00 544a 0800") + sizes
    assert f"one gzip member per {MEMBER_DATA_BYTES >> 20} MiB" in SPEC
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        first, *others = members.getmembers()
    assert first.name == "tiny-1.0/manifest.json"
    assert [m.name for m in others] == sorted(m.name for m in others)
    for member in (first, *others):
        assert member.isreg()
        assert (member.mode, member.uid, member.gid, member.uname) == (0o644, 0, 0, "")
        assert time.gmtime(member.mtime)[:6] == (2000, 1, 1, 0, 0, 0)
    assert tar.endswith(bytes(1024))
