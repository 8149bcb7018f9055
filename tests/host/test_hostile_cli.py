"""Hostile checkpoints through the command: one sentence, exit code 3, nothing run or written."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import packed_checkpoints as packed
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import save_file
from test_hostile_checkpoints import Payload

from host_tools import cli
from host_tools.checkpoint.tensor_files import MAX_HEADER_BYTES
from host_tools.checkpoint_names import MAX_INDEX_BYTES

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0."
ROOT = Path(cli.__file__).resolve().parents[1]


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """A place with a checkpoint, and beside it what no checkpoint may touch."""
    place = tmp_path / "sandbox"
    folder = tiny.write_llama(place / "checkpoint", eos_token_id=127)
    tiny.write_tokenizer(folder)
    (place / "secret.json").write_text('{"password": "hunter2"}')
    save_file({"model.norm.weight": torch.ones(64).half()}, place / "outside.safetensors")
    return place


def snapshot(place: Path) -> dict[str, object]:
    """Everything below a place by path: target of a link, size, content of small files."""
    found: dict[str, object] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            size = path.stat().st_size
            found[name] = path.read_bytes() if size < 1 << 20 else size
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def tensors_of(folder: Path) -> dict:
    return tiny.read_tensors(folder)


def save(folder: Path, tensors: dict, name: str = "model.safetensors") -> None:
    save_file(tensors, folder / name)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def pickled(folder: Path, value: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")


# ------------------------------------------------------------------------------------------------
# Each maker damages the sandbox's checkpoint.


def pickle_with_code(folder: Path) -> None:
    pickled(folder, {"x": Payload(folder.parent / "owned")})


def bare_pickle_with_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    data = pickle.dumps({"x": Payload(folder.parent / "owned")})
    (folder / "pytorch_model.bin").write_bytes(data)


def pickle_in_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shards = [f"pytorch_model-0000{part}-of-00002.bin" for part in (1, 2)]
    torch.save({"model.norm.weight": torch.ones(64)}, folder / shards[0])
    torch.save({"x": Payload(folder.parent / "owned")}, folder / shards[1])
    index = {"weight_map": {"model.norm.weight": shards[0], "x": shards[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def compressed_archive(folder: Path) -> None:
    pickled(folder, {"x": torch.zeros(1)})
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            bomb = b"\0" * (1 << 24) if name.endswith("data.pkl") else data
            archive.writestr(name, bomb)


def huge_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (MAX_HEADER_BYTES + 1))


def tensor_without_memory(folder: Path) -> None:
    pickled(folder, {"x": torch.empty(1 << 40, device="meta")})


def sparse_tensor(folder: Path) -> None:
    pickled(folder, {"x": torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,), check_invariants=True)})


def index_that_points_outside(folder: Path) -> None:
    tiny.write_shards(folder, tensors_of(folder), 2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def truncated_shard(folder: Path) -> None:
    tiny.write_shards(folder, tensors_of(folder), 2)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def missing_shard(folder: Path) -> None:
    tiny.write_shards(folder, tensors_of(folder), 2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def not_a_number(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save(folder, tensors)


def wrong_shape(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors[f"{LAYER}mlp.up_proj.weight"] = torch.zeros(96, 63).half()
    save(folder, tensors)


def no_axis(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["model.norm.weight"] = torch.tensor(1.0).half()
    save(folder, tensors)


def lie(**sizes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **sizes)


def index_of_ten_million(folder: Path) -> None:
    tiny.write_shards(folder, tensors_of(folder), 2)
    # Ten million entries of 50 bytes; the file is sparse, its size is what is looked at.
    with (folder / INDEX).open("r+b") as stream:
        stream.truncate(10_000_000 * 50)


def index_just_below_the_limit(folder: Path) -> None:
    tiny.write_shards(folder, tensors_of(folder), 2)
    with (folder / INDEX).open("w") as stream:
        stream.write('{"weight_map": {')
        stream.write(",".join(f'"{entry:07x}":"a"' for entry in range(MAX_INDEX_BYTES // 15)))
        stream.write("}}")
    assert (folder / INDEX).stat().st_size <= MAX_INDEX_BYTES


def header_of_absurd_length(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        stream.truncate(MAX_HEADER_BYTES + 100)


def raw_safetensors(folder: Path, header: str, size: int = 128) -> None:
    data = header.encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(size))


def entry(dtype: str = "F16", shape: str = "[64]", offsets: str = "[0, 128]") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}'


def name_twice_in_a_header(folder: Path) -> None:
    raw_safetensors(folder, f'{{"a": {entry()}, "a": {entry(offsets="[128, 256]")}}}', 256)


def overlapping_tensors(folder: Path) -> None:
    raw_safetensors(folder, f'{{"a": {entry()}, "b": {entry()}}}')


def sizes_that_overflow(folder: Path) -> None:
    raw_safetensors(folder, f'{{"a": {entry(shape="[4294967296, 4294967296, 2]")}}}')


def dtype_of_no_one(folder: Path) -> None:
    raw_safetensors(folder, f'{{"a": {entry("F17")}}}')


def dtype_of_no_checkpoint(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save(folder, tensors)


def name_that_climbs(folder: Path) -> None:
    save(folder, {**tensors_of(folder), "../../owned": torch.zeros(1)})


def name_with_control_characters(folder: Path) -> None:
    save(folder, {**tensors_of(folder), "a\nb\x1b[31m": torch.zeros(1)})


def tensor_in_two_shards(folder: Path) -> None:
    tiny.write_shards(folder, tensors_of(folder), 2)
    first = folder / "model-00001-of-00002.safetensors"
    tensors = {**tensors_of(folder)}
    save(folder, tensors, first.name)


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def packed_with(packing: str, **changes: torch.Tensor | None) -> Callable[[Path], None]:
    """A 4-bit checkpoint of a packing with tensors of one linear changed or removed."""

    def make(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), "intermediate_size": 128}
        tensors, _ = packed.packed_tensors(tiny.llama_tensors(config), packing, 32)
        for kind, value in changes.items():
            name = f"{LAYER}mlp.down_proj.{kind}"
            del tensors[name]
            if value is not None:
                tensors[name] = value
        section = packed.PACKINGS[packing][1](32)
        tiny.write_checkpoint(folder, {**config, "quantization_config": section}, tensors)

    return make


def merges(*pairs: tuple[str, str], **vocab: int) -> Callable[[Path], None]:
    """A byte-pair tokenizer with an empty token, these merges, and more tokens."""

    def make(folder: Path) -> None:
        words = {"a": 0, "b": 1, "ab": 2, "": 3, **vocab}
        model = {"type": "BPE", "vocab": words, "merges": [list(pair) for pair in pairs]}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))

    return make


WORDS = torch.int32
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle with code": (pickle_with_code, "no plain torch file .* nothing in it was executed"),
    "bare pickle with code": (bare_pickle_with_code, "nothing in it was executed"),
    "pickle with code in a shard": (pickle_in_a_shard, "nothing in it was executed"),
    "compressed torch file": (compressed_archive, "has 16777216 bytes in .* nothing in it was exe"),
    "torch file with a huge pickle": (huge_pickle, "has 16777217 bytes in 16777217"),
    "tensor without memory": (tensor_without_memory, "claims 1099511627776 elements, more than"),
    "sparse tensor": (sparse_tensor, "claims 1099511627776 elements|no plain torch file"),
    "index that points outside": (index_that_points_outside, "outside of the checkpoint's folder"),
    "truncated shard": (truncated_shard, "00002-of-00002.safetensors is no whole safetensors"),
    "missing shard": (missing_shard, "00002-of-00002.safetensors is missing|lacks 1 of the 2"),
    "NaN": (not_a_number, "1.mlp.up_proj.weight of model.safetensors holds NaN or infinity"),
    "wrong shape": (wrong_shape, r"up_proj.weight is torch.float16 \[96, 63\], config.json means"),
    "tensor without an axis": (no_axis, r"model.norm.weight is torch.float16 \[\], config"),
    "lie about hidden size": (lie(hidden_size=1 << 16), "embed_tokens.weight is .*config.json mea"),
    "lie about layers": (lie(num_hidden_layers=1 << 24), "expected 1 to|layers.2..* is missing"),
    "lie about the vocabulary": (lie(vocab_size=1 << 23), r"embed_tokens.weight is .* \[128, 64\]"),
    "lie about heads": (lie(num_attention_heads=1 << 20), "does not divide|config.json means"),
    "size that is no size": (lie(hidden_size=-1), "config.json says hidden_size -1, expected an i"),
    "size beyond all": (lie(hidden_size=10**30), "config.json says hidden_size 1000000000000000"),
    "size that is text": (lie(intermediate_size="96"), "says intermediate_size '96', expected an"),
    "index of ten million entries": (index_of_ten_million, "has 500000000 bytes, expected at most"),
    "header of absurd length": (header_of_absurd_length, "a header of 16777217 bytes, expected at"),
    "name twice in a header": (name_twice_in_a_header, "is no whole safetensors file"),
    "overlapping tensors": (overlapping_tensors, "is no whole safetensors file"),
    "sizes that overflow": (sizes_that_overflow, "is no whole safetensors file"),
    "dtype that is none": (dtype_of_no_one, "is no whole safetensors file"),
    "dtype of no checkpoint": (dtype_of_no_checkpoint, "has dtype F8_E4M3, expected one of"),
    "name that climbs": (name_that_climbs, "tensor ../../owned has no place in a llama model"),
    "name with control characters": (name_with_control_characters, "has no place in a llama model"),
    "tensor in two shards": (tensor_in_two_shards, "is in model-0000.-of-00002.safetensors and in"),
    "settings that link outside": (
        link("generation_config.json", "../secret.json"),
        "generation_config.json in .* is a link that leads out of it",
    ),
    "config that links outside": (link("config.json", "../secret.json"), "leads out of it"),
    "config that links to a device": (link("config.json", "/dev/zero"), "leads out of it, to /dev"),
    "link to nowhere": (
        link("vocab.json", "nothing"),
        "vocab.json in .* a link that leads nowhere",
    ),
    "link to itself": (link("vocab.json", "vocab.json"), "a link that leads nowhere"),
    "weights that link to a device": (link("model.safetensors", "/dev/zero"), "leads out of it"),
    "config that is a pipe": (pipe("config.json"), "has no readable config.json|has neither conf"),
    "weights that are a pipe": (pipe("model.safetensors"), "has no model.safetensors, pytorch_mod"),
    "GPTQ codes of another shape": (
        packed_with("gptq", qweight=torch.zeros(16, 32, dtype=WORDS)),
        "are no 4-bit GPTQ pair",
    ),
    "GPTQ zeros of another shape": (
        packed_with("gptq", qzeros=torch.zeros(4, 7, dtype=WORDS)),
        "down_proj.qzeros is torch.int32",
    ),
    "GPTQ with an order out of range": (
        packed_with("gptq", g_idx=torch.full((128,), 1 << 30, dtype=WORDS)),
        "g_idx puts input 0 into group 1073741824",
    ),
    "compressed codes of another shape": (
        packed_with("asymmetric", weight_packed=torch.zeros(64, 15, dtype=WORDS)),
        "tensors have 30|120 inputs in 4 groups|down_proj",
    ),
    "compressed shape that lies": (
        packed_with("asymmetric", weight_shape=torch.tensor([1 << 40, 1 << 40])),
        "weight_shape says",
    ),
    "tokenizer whose merges go in a circle": (
        merges(("a", "b"), ("", "ab")),
        "merge 1 of .*tokenizer.json makes 'ab' of itself, merges must not go in a circle",
    ),
    "tokenizer whose merges lead nowhere": (
        merges(("b", "a")),
        "tokenizer.json joins 'b' and 'a', of which one or the whole is no token",
    ),
    "tokenizer with an id beyond the embedding": (
        merges(("a", "b"), c=1 << 30),
        "has the token id 1073741824, the embedding has 128 rows",
    ),
    "AWQ without zeros": (packed_with("awq", qzeros=None), "down_proj.qzeros is missing"),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def check_sentence(code: int, said: str, complaint: str) -> None:
    """Progress may come first; the last line is the sentence, and it is the only complaint."""
    assert code == 3, said
    last = said.splitlines()[-1]
    assert last.startswith("turbojet-host: ")
    assert said.count("turbojet-host: ") == 1
    assert "internal error" not in last
    assert "Traceback" not in said
    assert len(last) < 1000
    assert not any(ord(letter) < 32 for letter in last)
    assert re.search(complaint, last), last


@pytest.mark.parametrize("name", CASES)
def test_convert_refuses_it(sandbox: Path, tmp_path: Path, capsys, name: str) -> None:
    make, complaint = CASES[name]
    make(sandbox / "checkpoint")
    before = snapshot(sandbox)
    started = time.process_time()
    output = tmp_path / "out" / "tm"
    said = run(capsys, "convert", sandbox / "checkpoint", "--model-name", "x", "--output", output)
    check_sentence(*said, complaint)
    assert time.process_time() - started < 10
    assert snapshot(sandbox) == before
    assert not (output / "triton_models").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) in (["sandbox"], ["out", "sandbox"])


VERBS = {
    "fetch": ("--output", "OUT/ckpt"),
    "calibrate": ("--work-dir", "OUT/work", "--calib-samples", "1", "--calib-seqlen", "8"),
    "quantize": ("--work-dir", "OUT/work", "--output", "OUT/awq", "--method", "rtn"),
    "evaluate": ("--samples", "1", "--seqlen", "8", "--dataset", "TEXT"),
    "build": ("--output", "OUT/x.tgz", "--method", "none", "--target", "orin-nano-8gb"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "name",
    [
        "pickle with code", "index that points outside", "truncated shard",
        "settings that link outside", "index of ten million entries", "config that is a pipe",
    ],
)  # fmt: skip
def test_every_other_verb_refuses_it_too(
    sandbox: Path, tmp_path: Path, capsys, monkeypatch, verb: str, name: str
) -> None:
    make, complaint = CASES[name]
    if verb == "fetch" and name in ("pickle with code", "truncated shard"):
        pytest.skip("fetch of a folder looks at names and sizes; the reader opens the weights")
    make(sandbox / "checkpoint")
    before = snapshot(sandbox)
    text = tiny.write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    places = {"OUT": str(tmp_path / "out"), "TEXT": str(text)}
    arguments = []
    for word in VERBS[verb]:
        for key, value in places.items():
            word = word.replace(key, value)
        arguments.append(word)
    check_sentence(*run(capsys, verb, sandbox / "checkpoint", *arguments), complaint)
    assert snapshot(sandbox) == before


def test_code_beside_the_weights_is_carried_and_never_run(sandbox: Path, tmp_path, capsys) -> None:
    folder = sandbox / "checkpoint"
    code = f"open({str(tmp_path / 'owned')!r}, 'w')"
    for name in ("modeling_tiny.py", "configuration_tiny.py", "tokenization_tiny.py", "setup.py"):
        (folder / name).write_text(code)
    auto_map = {"AutoModelForCausalLM": "modeling_tiny.Tiny", "AutoConfig": "configuration_tiny.C"}
    edit_config(folder, auto_map=auto_map)
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_tiny.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    arguments = ("convert", folder, "--model-name", "x", "--output", tmp_path / "tm")
    assert run(capsys, *arguments)[0] == 0
    assert not (tmp_path / "owned").exists()


# Peak memory of the child itself: what its parent is told begins with the size of the parent.
MEASURED = """
import resource, sys
from pathlib import Path
from host_tools import cli
code = cli.main(sys.argv[2:])
peak = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
Path(sys.argv[1]).write_text(f"{peak.split()[1]} {seconds}")
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (index_just_below_the_limit, "a is missing in "),
        (tensor_without_memory, "claims 1099511627776 elements"),
    ],
)
def test_the_process_stays_small_and_quick(sandbox: Path, tmp_path: Path, make, complaint) -> None:
    make(sandbox / "checkpoint")
    command = [
        sys.executable, "-c", MEASURED, str(tmp_path / "measured"), "convert",
        str(sandbox / "checkpoint"), "--model-name", "x", "--output", str(tmp_path / "tm"),
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    check_sentence(ended.returncode, ended.stderr, complaint)
    peak_kb, seconds = map(float, (tmp_path / "measured").read_text().split())
    # torch alone takes a few hundred MB; the largest index allowed adds less than as much again.
    assert peak_kb < 1_500_000
    assert seconds < 20
