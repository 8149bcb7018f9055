"""The race checker of the emulator: it tells what is wrong in kernels made so, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import emulator, races
from numpy.typing import NDArray

from device_runtime.kernels.table import Kernel

pytestmark = pytest.mark.skipif(
    not emulator.has_compiler(), reason="the kernels run on the CPU where there is g++"
)

SOURCE = emulator.RACE_CHECK.with_name("racy_kernels.cu")
THREADS = 64
IN_A_BLOCK = {
    "barrier_between": "has a race",
    "barrier_before_reuse": "has a race",
    "warp_between": "has a race",
    "bytes_of_words": "has a race",
    "same_value": "has a race",
    "copy_waited_for": "is used before its asynchronous copy was waited for",
    "copy_of_another": "has a race",
    "copy_into_read": "has a race",
}
"""What is wrong with each where it is broken."""
OF_TWO_BLOCKS = {
    "ticket_of_block": "parts",
    "counter_of_block": "parts",
    "word_that_tells": "words",
}
"""The array that two blocks have a race for."""
ROWS = {
    row.name: row
    for row in [
        *(Kernel(name, "", "PPi", THREADS, 0) for name in IN_A_BLOCK),
        Kernel("ticket_of_block", "", "PPPi", THREADS, 0),
        Kernel("counter_of_block", "", "PPPi", THREADS, 0),
        Kernel("word_that_tells", "", "PPi", THREADS, 0),
        Kernel("waits_for_block", "", "PPi", THREADS, 0),
        Kernel("first_of_step", "", "PPi", THREADS, 0),
        Kernel("reads_early", "", "PPPi", THREADS, 0),
        Kernel("writes_early", "", "PPi", THREADS, 0),
        Kernel("one_waits", "", "PPi", THREADS, 0),
        Kernel("passes_on", "", "PPi", THREADS, 0),
    ]
}


def launch(name: str, *arguments: NDArray[np.uint32] | int, grid: int = 1) -> list[races.Race]:
    built = emulator.build(SOURCE, ROWS.values(), (races.RACE_FLAG,))
    races.run(built, SOURCE, ROWS[name], (grid, 1, 1), list(arguments), 16 * THREADS)
    return races.collect()


def words(count: int = 4 * THREADS) -> NDArray[np.uint32]:
    return np.arange(count, dtype=np.uint32)


@pytest.mark.parametrize("name", IN_A_BLOCK)
def test_a_race_of_threads_is_told(name: str) -> None:
    assert launch(name, words(), words(), 0) == []
    found = launch(name, words(), words(), 1)
    assert IN_A_BLOCK[name] in {race.what for race in found}
    assert {race.later.kernel for race in found} == {name}


def test_a_race_is_told_with_its_array_and_lines() -> None:
    found = launch("barrier_between", words(), words(), 1)
    (race,) = (race for race in found if race.earlier.kind == "write")
    lines = SOURCE.read_text().splitlines()
    numbers = [int(side.line.split(":")[1]) for side in (race.earlier, race.later)]
    assert [lines[number - 1].strip() for number in numbers] == [
        "words[threadIdx.x] = in[threadIdx.x];",
        "out[threadIdx.x] = words[next_thread()];",
    ]
    assert race.array == "__shared__ array"
    assert "write by barrier_between" in str(race)


@pytest.mark.parametrize("name", OF_TWO_BLOCKS)
def test_a_race_of_blocks_is_told(name: str) -> None:
    for is_broken in (0, 1):
        arrays = [words(), np.zeros(4 * THREADS, np.uint32), np.zeros(1, np.uint32)]
        found = launch(name, *arrays[: len(ROWS[name].arguments) - 1], is_broken, grid=3)
        assert {race.array for race in found} == ({OF_TWO_BLOCKS[name]} if is_broken else set())


def test_a_block_that_waits_for_one_that_has_not_begun_is_told() -> None:
    built = emulator.build(SOURCE, ROWS.values(), ())

    def run(is_broken: int) -> None:
        arrays = [np.zeros(4, np.float32) for _ in range(2)]
        emulator.run(built, ROWS["waits_for_block"], (2, 1, 1), [*arrays, is_broken])

    run(0)
    with pytest.raises(RuntimeError, match="waits_for_block: a warp waits for what does not come"):
        run(1)


class Stream:
    """Launches that follow each other on the same buffers."""

    def __init__(self) -> None:
        self.built = emulator.build(SOURCE, ROWS.values(), (races.RACE_FLAG,))
        self.buffers = {name: words() for name in ("a", "b", "c", "weights")}
        for name, buffer in self.buffers.items():
            races.add_global(buffer.ctypes.data, buffer.nbytes, name)
        races.full_edge()

    def launch(self, name: str, *buffers: str, is_broken: bool, is_programmatic: bool) -> None:
        function = getattr(self.built, f"emulate_{name}")
        values = [emulator.CTYPES["P"](self.buffers[buffer].ctypes.data) for buffer in buffers]
        size, one = emulator.ctypes.c_size_t(0), emulator.ctypes.c_uint(1)
        block = emulator.CTYPES["i"](THREADS)
        with races.watch(name, is_programmatic=is_programmatic):
            flag = emulator.CTYPES["i"](is_broken)
            function(one, one, one, block, emulator.CTYPES["i"](1), size, *values, flag)

    def close(self) -> list[races.Race]:
        for buffer in self.buffers.values():
            races.drop_global(buffer.ctypes.data)
        return races.collect()


@pytest.mark.parametrize("is_programmatic", [True, False])
@pytest.mark.parametrize("is_broken", [True, False])
@pytest.mark.parametrize(
    ("name", "buffers", "what", "array"),
    [
        ("reads_early", ("c", "b", "weights"), "has a race between two kernels", "b"),
        ("writes_early", ("a", "b"), "is written before the kernel waits", "a"),
        ("one_waits", ("c", "b"), "has a race between two kernels", "b"),
    ],
)
def test_a_kernel_that_overtakes_the_one_before_is_told(
    name: str,
    buffers: tuple[str, ...],
    what: str,
    array: str,
    is_broken: bool,
    is_programmatic: bool,
) -> None:
    stream = Stream()
    stream.launch("first_of_step", "b", "a", is_broken=False, is_programmatic=False)
    stream.launch(name, *buffers, is_broken=is_broken, is_programmatic=is_programmatic)
    found = stream.close()
    assert bool(found) == (is_broken and is_programmatic)
    if found:
        assert any(what in race.what and race.array == array for race in found)


@pytest.mark.parametrize("is_broken", [True, False])
def test_a_kernel_that_never_waits_lets_the_next_overtake_the_one_before(is_broken: bool) -> None:
    stream = Stream()
    stream.launch("first_of_step", "b", "a", is_broken=False, is_programmatic=False)
    stream.launch("passes_on", "c", "c", is_broken=is_broken, is_programmatic=True)
    stream.launch("first_of_step", "c", "b", is_broken=False, is_programmatic=True)
    told = [(race.what, race.later.kernel) for race in stream.close()]
    if is_broken:
        assert ("never waits for the kernels before it", "passes_on") in told
        assert ("has a race between two kernels", "first_of_step") in told
    else:
        assert told == []


def test_a_graph_or_copy_begins_when_all_before_it_is_done() -> None:
    stream = Stream()
    stream.launch("first_of_step", "b", "a", is_broken=False, is_programmatic=False)
    races.full_edge()
    stream.launch("reads_early", "c", "b", "weights", is_broken=True, is_programmatic=True)
    assert stream.close() == []
