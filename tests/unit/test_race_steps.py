"""No race in the kernels, one by one and in the whole steps that the backend launches.

Everything that decides an order is there: barriers, copies, tickets, and when a kernel waits for
those before it (race_check.cpp). Each variant of each kernel runs in the tests marked slow.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from attention_cases import Heads, check_decode, check_prefill
from emulator import emulator, races
from gemv_cases import GemvCase, run_gemv
from linear_cases import GemmCase, HeadCase, run_gemm, run_head, run_norm
from race_checked_cuda import RaceCheckedCuda
from sampling_cases import SETTINGS, Rows, check_embedding, check_sampling
from test_emulated_backend import (
    CASES,
    CUDA,
    DRAWN,
    GREEDY,
    MODEL,
    Case,
    prepare,
    prompt,
    tokens_of,
)

from device_runtime.backends.cuda.graph_set import EAGER_VARIABLE
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, GenerationParams
from device_runtime.kernels.cubins import GROUP_SIZES
from device_runtime.kernels.gemv_shape import GemvShape, pair_gemv
from device_runtime.kernels.table import F16_GEMM_TILES, GEMM_TILES, GEMV_STAGES

pytestmark = pytest.mark.skipif(
    not emulator.has_compiler(), reason="the kernels run on the CPU where there is g++"
)
PLAIN = ("-DTURBOJET_PLAIN=1",)
Grid: TypeAlias = tuple[int, int, int]


def generate(root: Path, *lengths: list[int]) -> None:
    """Prompts of some lengths at once and decode steps after them, greedy and drawn."""
    with Engine.open(root, CUDA) as engine:
        for sampling in (GREEDY, DRAWN):
            params = GenerationParams(max_tokens=3, sampling=sampling, ignore_eos=True)
            for together in lengths:
                prompts = [prompt(length, length) for length in together]
                assert all(tokens_of(engine, prompts, params))


def test_a_step_has_no_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(tmp_path / "tiny", Case(MODEL), monkeypatch, RaceCheckedCuda)
    generate(prepared.root, [3], [12, 15, 2])
    assert races.collect() == []
    # Most launches of a step may begin before the kernel in front of them is done.
    launched = [launch.is_programmatic for launch in prepared.fake.launches]
    assert sum(launched) > 0.8 * len(launched)


def test_blocks_of_decode_attention_may_start_in_any_order() -> None:
    """No race and the same bits; a block that waited for one that has not begun would be told."""
    library = emulator.library("decode_attention", races.RACE_FLAG)
    results: tuple[list[bytes], list[bytes]] = ([], [])

    def launch(name: str, grid: Grid, arguments: list[Any], shared_bytes: int) -> None:
        races.launch(name, grid, arguments, shared_bytes)
        results[is_backwards].append(arguments[0].tobytes())

    for is_backwards in (False, True):
        library.emulate_backwards(int(is_backwards))
        try:
            for heads, lengths in (
                (Heads(8, 128, 4, 4), [200, 1, 64, 65]),
                (Heads(0, 64, 8, 1, has_norm=True), [333, 0, 20]),
                # More splits than are added at once.
                (Heads(8, 64, 32, 2), [650]),
            ):
                check_decode(launch, heads, lengths, max_splits=6)
        finally:
            library.emulate_backwards(0)
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_step_has_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    prepared = prepare(tmp_path / "tiny", CASES[name], monkeypatch, RaceCheckedCuda)
    generate(prepared.root, [75], [5, 35, 65, 100, 12])
    assert races.collect() == []


@pytest.mark.slow
def test_kernels_that_are_launched_one_by_one_have_no_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EAGER_VARIABLE, "1")
    prepared = prepare(tmp_path / "tiny", Case(MODEL), monkeypatch, RaceCheckedCuda)
    generate(prepared.root, [3], [70, 20])
    assert races.collect() == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), PLAIN], ids=["default", "plain"])
@pytest.mark.parametrize("policy", [0, 4, 8])
def test_attention_has_no_race(policy: int, flags: tuple[str, ...]) -> None:
    launch = partial(races.launch, flags=flags)
    for heads, lengths, splits, slots in (
        (Heads(policy, 128, 4, 4), [200, 1, 64, 0, 65], 3, 4),
        (Heads(policy, 64, 9, 3, page_size=192, has_norm=True), [300, 257], 2, 3),
        (Heads(policy, 128, 12, 2), [130], 1, 2),
        # Blocks with 8 of 16 query heads; more splits than are added at once.
        (Heads(policy, 64, 32, 2, num_ranks=2), [650], 6, 4),
    ):
        # A slot of fp16 is twice as large, and a ring half as long.
        in_ring = slots if policy else slots // 2
        check_decode(launch, heads, lengths, max_splits=splits, slots=in_ring)
    for heads, sequences in (
        (Heads(policy, 128, 12, 2, has_norm=True), [(130, 20), (0, 65), (63, 2), (7, 1)]),
        (Heads(policy, 64, 16, 1, page_size=128), [(97, 40), (0, 32)]),
    ):
        check_prefill(launch, heads, sequences)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), PLAIN], ids=["default", "plain"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("width", [1, 4, 8])
def test_the_gemv_has_no_race(width: int, group_size: int, flags: tuple[str, ...]) -> None:
    launch = partial(races.launch, flags=(f"-DTURBOJET_GROUP_SIZE={group_size}", *flags))
    stages = GEMV_STAGES[width]
    # Several tiles of a block, in batches, phases, fewer units than warps, and more.
    for sizes, output, grid, phase_units, held in (
        ((640, 160), "norm", 1, 3, 2),
        ((256, 96), "norm_silu", 1, 1, 3),
        ((1536, 224), "add", 1, 4, 4),
        ((4992, 128), "add", 2, 20, 2),
    ):
        shape = GemvShape(width, *sizes, group_size, grid, phase_units, held, stages)
        run_gemv(launch, GemvCase(width if width == 1 else width - 1, shape, output))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("-DTURBOJET_GEMV_PARTS=2", "-DTURBOJET_GEMV_EARLY_PARTS=1"),
        ("-DTURBOJET_GEMV_SINGLE_EARLY=2",),
        ("-DTURBOJET_GEMV_SINGLE_EARLY=0",),
    ],
    ids=str,
)
def test_a_ring_that_is_filled_in_portions_has_no_race(flags: tuple[str, ...]) -> None:
    launch = partial(races.launch, flags=flags)
    shape = GemvShape(1, 1152, 160, 128, 2, 3, 1, GEMV_STAGES[1])
    run_gemv(launch, GemvCase(1, shape, "add"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), PLAIN], ids=["default", "plain"])
def test_blocks_of_half_the_warps_have_no_race(flags: tuple[str, ...]) -> None:
    shape = GemvShape(1, 2304, 64, 128, 2, 9, 1, GEMV_STAGES[1])
    paired = pair_gemv(shape, 227 * 1024)
    assert paired != shape
    run_gemv(partial(races.launch, flags=flags), GemvCase(1, paired, "add"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), PLAIN], ids=["default", "plain"])
@pytest.mark.parametrize(
    ("tile", "group_size"),
    [
        *((tile, size) for tile in GEMM_TILES for size in (128, 32)),
        *((t, 0) for t in F16_GEMM_TILES),
    ],
)
def test_the_gemm_has_no_race(tile: int, group_size: int, flags: tuple[str, ...]) -> None:
    groups = (f"-DTURBOJET_GROUP_SIZE={group_size}",) if group_size else ()
    launch = partial(races.launch, flags=(*groups, *flags))
    # Blocks with several whole tiles, and tiles whose parts several blocks make.
    for num_tokens, sizes, output, num_sms in (
        (2 * tile + 1, (256, 160), "half", 1),
        (tile + 1, (1152, 96), "add", 4),
        (tile, (384, 160), "silu", 3),
    ):
        run_gemm(launch, GemmCase(tile, num_tokens, *sizes, group_size, output, num_sms))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), PLAIN], ids=["default", "plain"])
def test_head_norm_embedding_and_sampling_have_no_race(flags: tuple[str, ...]) -> None:
    launch = partial(races.launch, flags=flags)
    for num_rows, is_int8 in ((1, True), (3, True), (8, True), (1, False), (8, False)):
        run_head(launch, HeadCase(num_rows, 192, 333, is_int8=is_int8, grid=2))
    run_norm(launch, 3, 260)
    for is_half in (False, True):
        check_embedding(launch, is_half=is_half)
    for params in SETTINGS.values():
        # More tokens than a list in shared memory takes, and fewer.
        for vocab_size in (5003, 1003):
            check_sampling(launch, params, vocab_size, rows=2, is_half=vocab_size == 1003)
    # More of one logit than can be ranked at once.
    ties = np.random.default_rng(3).integers(0, 3, (1, 9000)).astype(np.float32)
    for params in (SamplingParams(top_k=40, top_p=0.5), SamplingParams(top_k=0, top_p=0.3)):
        Rows(ties, 9000, [params]).step(launch)
