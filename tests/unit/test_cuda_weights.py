"""Weight files land where the kernels look for them, whole and joined over ranks."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from fake_cuda import FakeCuda, install
from tiny_package import make_package, tiny_model

from device_runtime.backends.cuda import loader
from device_runtime.backends.cuda.arena import allocate_arena
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.loader import drop_from_page_cache, load_weights, plan_fills
from device_runtime.backends.cuda.loader_pairs import load_pairs
from device_runtime.backends.cuda.sizes import STAGING_BYTES
from device_runtime.backends.cuda.weights import (
    layer_name,
    padded_rows,
    static_kv_parameters,
    weight_layout,
)
from device_runtime.errors import PackageError
from device_runtime.package_format import int4, names
from device_runtime.package_format.package import open_package

TWO_RANKS = tiny_model(tensor_para_size=2, has_attention_bias=True, vocab_size=318)


def load(root, monkeypatch) -> dict[str, np.ndarray]:
    """Load a package on the fake device; return the bytes of each tensor."""
    return load_with(install(monkeypatch), root)


def load_with(fake, root) -> dict[str, np.ndarray]:
    package = open_package(root)
    layout = weight_layout(package.model)
    with CudaDriver() as driver:
        arena = allocate_arena(driver, layout.region_sizes, "weights")
        places = layout.places(arena.addresses)
        stream = driver.new_stream()
        load_weights(driver, stream, package.root, layout.pieces, places)
        load_pairs(driver, stream, package, layout.pairs, places)
        loaded = {}
        for name, size in layout.sizes.items():
            loaded[name] = np.empty(size, np.uint8)
            driver.copy_to_host(loaded[name].ctypes.data, places[name], size)
        arena.free()
    assert not fake.pinned
    return loaded


@pytest.mark.parametrize("staging_bytes", [1 << 20, 2048])
def test_a_package_of_one_rank_lies_as_on_disk(tmp_path, monkeypatch, staging_bytes) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", staging_bytes)
    monkeypatch.setattr(loader, "plan_fills", lambda pieces: plan_fills(pieces, staging_bytes))
    made = make_package(tmp_path / "tiny")
    loaded = load(made.root, monkeypatch)
    package = open_package(made.root)
    for spec in package.specs:
        want = np.frombuffer((made.root / spec.path).read_bytes(), np.uint8)
        key = spec.name if spec.split == "none" else _without_rank(spec.name)
        assert np.array_equal(loaded[key][: len(want)], want), spec.name


def test_ranks_become_one_matrix(tmp_path, monkeypatch) -> None:
    made = make_package(tmp_path / "tiny", TWO_RANKS)
    loaded = load(made.root, monkeypatch)
    package = open_package(made.root)
    hidden, inner = TWO_RANKS.hidden_size, TWO_RANKS.intermediate_size
    for module, num_inputs, num_outputs, axis in (
        (names.W_QKV, hidden, TWO_RANKS.qkv_size, 1),
        (names.W13, hidden, 2 * inner, 1),
        (names.WO, TWO_RANKS.q_size, hidden, 0),
        (names.W2, inner, hidden, 0),
    ):
        parts = []
        for rank in range(2):
            words = package.tensor(names.layer_tensor(1, module, rank, names.QWEIGHT))
            shape = [num_inputs, num_outputs]
            shape[axis] //= 2
            parts.append(int4.unpack_words(words, *shape))
        want = np.concatenate(parts, axis=axis)
        words = loaded[layer_name(1, module, names.QWEIGHT)].view(np.uint32)
        assert np.array_equal(int4.unpack_words(words, num_inputs, num_outputs), want), module
        pairs = [
            package.tensor(names.layer_tensor(1, module, rank, names.SCALES_ZEROS))
            for rank in range(2)
        ]
        joined = np.concatenate(pairs, axis=axis)
        got = loaded[layer_name(1, module, names.SCALES_ZEROS)].view(np.uint32)
        assert np.array_equal(got.reshape(joined.shape), joined), module


@pytest.mark.parametrize("staging_bytes", [1 << 20, 4096])
@pytest.mark.parametrize("ranks", [1, 2])
def test_gate_and_up_in_fp16_take_turns(tmp_path, monkeypatch, ranks, staging_bytes) -> None:
    monkeypatch.setattr("device_runtime.backends.cuda.loader_pairs.STAGING_BYTES", staging_bytes)
    model = tiny_model(weight_type="fp16", group_size=0, tensor_para_size=ranks)
    made = make_package(tmp_path / "tiny", model)
    loaded = load(made.root, monkeypatch)
    package = open_package(made.root)
    columns = []
    for rank in range(ranks):
        gate, up = (
            package.tensor(names.layer_tensor(1, module, rank, names.WEIGHT))
            for module in (names.W1, names.W3)
        )
        columns.append(np.stack([gate, up], axis=-1).reshape(len(gate), -1))
    want = np.concatenate(columns, axis=1)
    got = loaded[layer_name(1, names.W13, names.WEIGHT)].view(np.float16)
    assert np.array_equal(got.reshape(want.shape), want)


def test_linears_that_stay_fp16_lie_among_the_codes(tmp_path, monkeypatch) -> None:
    kept = ("layers.0.feed_forward.w13", "layers.1.attention.w_qkv")
    made = make_package(tmp_path / "tiny", tiny_model(fp16_linears=kept))
    loaded = load(made.root, monkeypatch)
    package = open_package(made.root)
    gate_up = [package.tensor(f"layers.0.feed_forward.{w}.0.weight") for w in ("w1", "w3")]
    woven = np.stack(gate_up, axis=-1).reshape(len(gate_up[0]), -1)
    assert np.array_equal(loaded["layers.0.feed_forward.w13.weight"], woven.view(np.uint8).ravel())
    qkv = package.tensor("layers.1.attention.w_qkv.0.weight")
    assert np.array_equal(loaded["layers.1.attention.w_qkv.weight"], qkv.view(np.uint8).ravel())
    words = package.tensor("layers.1.feed_forward.w13.0.qweight")
    assert np.array_equal(loaded["layers.1.feed_forward.w13.qweight"], words.view(np.uint8))


def test_a_bias_of_columns_is_joined_and_one_of_rows_taken_once(tmp_path, monkeypatch) -> None:
    made = make_package(tmp_path / "tiny", TWO_RANKS)
    loaded = load(made.root, monkeypatch)
    package = open_package(made.root)
    parts = [package.tensor(names.layer_tensor(0, names.W_QKV, r, names.BIAS)) for r in range(2)]
    got = loaded[layer_name(0, names.W_QKV, names.BIAS)].view(np.float16)
    assert np.array_equal(got, np.concatenate(parts))
    bias = package.tensor(names.layer_tensor(0, names.WO, 0, names.BIAS))
    assert np.array_equal(loaded[layer_name(0, names.WO, names.BIAS)].view(np.float16), bias)


def test_tables_have_room_for_rows_in_eights() -> None:
    # 318 tokens over two ranks are 318 rows, the sampler reads 320.
    assert padded_rows(TWO_RANKS) == 320
    sizes = weight_layout(TWO_RANKS).sizes
    assert sizes[names.TOK_EMBEDDINGS] == 320 * 128 * 2
    assert sizes[names.OUTPUT] == 320 * 128 * 2


def test_fills_hold_whole_rows_and_no_more_than_a_buffer() -> None:
    pieces = weight_layout(TWO_RANKS).pieces
    seen: dict[str, int] = {}
    for parts in plan_fills(pieces, 6000):
        assert parts
        for part in parts:
            assert part.staged % 64 == 0
            assert part.staged + part.num_bytes <= 6000
            assert part.first_byte == seen.get(part.piece.spec.name, 0)
            if part.piece.num_rows > 1:
                assert part.num_bytes % part.piece.row_bytes == 0
            seen[part.piece.spec.name] = part.first_byte + part.num_bytes
    assert seen == {piece.spec.name: piece.spec.size_bytes for piece in pieces}


def test_the_page_cache_is_told_to_forget_every_file(tmp_path, monkeypatch) -> None:
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advised.append(arguments[1:]))
    made = make_package(tmp_path / "tiny")
    load(made.root, monkeypatch)
    files = len(weight_layout(made.model).pieces)
    assert advised == [(0, 0, os.POSIX_FADV_DONTNEED)] * files


def test_loading_leaves_the_page_cache_and_pins_two_buffers(tmp_path, monkeypatch) -> None:
    # A file of 8 MiB, so that what is left of it in the page cache is no accident.
    model = tiny_model(vocab_size=1 << 15)
    made = make_package(tmp_path / "tiny", model)
    fake = install(monkeypatch)
    pinned = []
    allocate = fake.do_cuMemHostAlloc
    monkeypatch.setattr(
        type(fake),
        "do_cuMemHostAlloc",
        lambda self, pointer, size, flags: (
            allocate(pointer, size, flags),
            pinned.append(sum(len(block) for block in self.pinned.values())),
            0,
        )[-1],
    )
    path = made.root / names.weight_path(names.TOK_EMBEDDINGS)
    drop_from_page_cache(path)
    if cached_share(path) > 0.01:
        pytest.skip("this file system keeps files in memory; it runs where /tmp is a disk")
    path.read_bytes()
    assert cached_share(path) == 1.0
    load_with(fake, made.root)
    assert cached_share(path) < 0.01
    assert max(pinned) == 2 * STAGING_BYTES


class LateCuda(FakeCuda):
    """Copies on a stream happen when somebody waits for them, and not before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.late: deque[Callable[[], None]] = deque()
        self.num_done = 0
        self.recorded: dict[int, int] = {}

    def do_cuMemcpyHtoDAsync_v2(self, *arguments):
        self.late.append(partial(super().do_cuMemcpyHtoDAsync_v2, *arguments))

    def do_cuMemcpy2DAsync_v2(self, *arguments):
        self.late.append(partial(super().do_cuMemcpy2DAsync_v2, *arguments))

    def do_cuEventCreate(self, event, flags):
        event._obj.value = id(event._obj)

    def do_cuEventRecord(self, event, stream):
        self.recorded[event.value] = self.num_done + len(self.late)

    def do_cuEventSynchronize(self, event):
        self.do_copies(self.recorded.get(event.value, 0))

    def do_cuStreamSynchronize(self, stream):
        self.do_copies(self.num_done + len(self.late))

    def do_cuMemFreeHost(self, pointer):
        assert not self.late, "what copies still read is freed"
        return super().do_cuMemFreeHost(pointer)

    def do_copies(self, end: int) -> None:
        while self.num_done < end:
            self.late.popleft()()
            self.num_done += 1


@pytest.mark.parametrize("model", [TWO_RANKS, tiny_model(weight_type="fp16", group_size=0)])
def test_copies_that_are_late_find_what_they_were_to_copy(tmp_path, monkeypatch, model) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", 4096)
    monkeypatch.setattr(loader, "plan_fills", lambda pieces: plan_fills(pieces, 4096))
    monkeypatch.setattr("device_runtime.backends.cuda.loader_pairs.STAGING_BYTES", 4096)
    made = make_package(tmp_path / "tiny", model)
    want = load(made.root, monkeypatch)
    got = load_with(install(monkeypatch, LateCuda()), made.root)
    assert all(np.array_equal(got[name], data) for name, data in want.items())
    # A load that fails waits for what is on its way, too.
    path = made.root / names.weight_path(names.OUTPUT)
    path.write_bytes(path.read_bytes()[:-2])
    monkeypatch.setattr(loader, "check_file", lambda *arguments: 0)
    monkeypatch.setattr("device_runtime.package_format.package.check_tensor_files", _all_files)
    fake = install(monkeypatch, LateCuda())
    with pytest.raises(PackageError, match=r"output.weight ends at byte \d+"):
        load_with(fake, made.root)
    assert not fake.pinned


def cached_share(path) -> float:
    """Return the share of a file's pages that the page cache holds (mincore(2))."""
    library = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as view:
        pages = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        address = np.frombuffer(view, np.uint8).ctypes.data
        assert library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags) == 0
        return sum(flag & 1 for flag in flags) / pages


def test_a_file_that_shrank_while_it_is_read_is_told(tmp_path, monkeypatch) -> None:
    made = make_package(tmp_path / "tiny")
    monkeypatch.setattr(loader, "check_file", lambda *arguments: 0)
    path = made.root / names.weight_path(names.FINAL_NORM)
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr("device_runtime.package_format.package.check_tensor_files", _all_files)
    with pytest.raises(PackageError, match=r"norm.weight ends at byte 100, expected 256"):
        load(made.root, monkeypatch)


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_that_cannot_be_read_is_told(tmp_path, monkeypatch, call) -> None:
    made = make_package(tmp_path / "tiny")

    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(PackageError, match=r"weight cannot be read: .*Input/output error"):
        load(made.root, monkeypatch)


def test_static_parameters_are_repeated_for_the_heads_of_each_rank() -> None:
    rows = static_kv_parameters(((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)), 4)
    assert rows.tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8]]


def _without_rank(name: str) -> str:
    parts = name.split(".")
    return ".".join((*parts[:-2], parts[-1]))


def _all_files(root, model):
    from device_runtime.package_format.tensors import tensor_specs

    return tensor_specs(model, has_kv_scales=False)
