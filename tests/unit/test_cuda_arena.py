"""Device memory comes in one block, else in chunks, else as mapped chunks."""

from __future__ import annotations

import pytest
from fake_cuda import FakeCuda, install

from device_runtime.backends.cuda import survey
from device_runtime.backends.cuda.arena import CHUNK_BYTES, allocate_arena
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.regions import ALIGNMENT, group_regions, region_bytes
from device_runtime.errors import DeviceError, OutOfMemoryError

MIB = 1 << 20


def test_regions_are_aligned_and_do_not_overlap(monkeypatch) -> None:
    fake = install(monkeypatch)
    with CudaDriver() as driver:
        arena = allocate_arena(driver, [1, 256, 300, 0, 5], "weights")
        # 256 + 256 + 512 + 0 + 256
        assert arena.num_bytes == region_bytes([1, 256, 300, 0, 5]) == 1280
        base = arena.addresses[0]
        assert [place - base for place in arena.addresses] == [0, 256, 512, 1024, 1024]
        assert base % ALIGNMENT == 0
        assert arena.how == "one block"
        arena.free()
    assert fake.num_bytes == 0


def test_a_large_block_that_is_refused_comes_in_chunks(monkeypatch) -> None:
    monkeypatch.setattr("device_runtime.backends.cuda.arena.CHUNK_BYTES", 2 * MIB)
    fake = install(monkeypatch, FakeCuda(largest_block=3 * MIB))
    with CudaDriver() as driver:
        arena = allocate_arena(driver, [MIB, MIB, MIB, 3 * MIB], "weights")
        assert arena.how == "chunks"
        assert len(fake.device) == 3  # two regions, one, and the one that is larger than a chunk
        assert arena.addresses[1] - arena.addresses[0] == MIB
        arena.free()
    assert fake.num_bytes == 0


def test_chunks_that_are_refused_are_mapped(monkeypatch) -> None:
    fake = install(monkeypatch, FakeCuda(largest_block=0))
    with CudaDriver() as driver:
        arena = allocate_arena(driver, [3 * MIB, 700 * MIB], "weights")
        assert arena.how == "mapped chunks"
        # 703 MiB in granules of 2 MiB: 512 and 192.
        assert sorted(fake.mapped.values()) == [192 * MIB, 512 * MIB]
        assert arena.addresses[1] - arena.addresses[0] == 3 * MIB
        arena.free()
    assert fake.num_bytes == 0


@pytest.mark.parametrize("missing", [set(), {"cuMemAddressReserve"}, {"cuMemCreate"}])
def test_where_nothing_helps_the_message_says_what_to_do(monkeypatch, missing) -> None:
    fake = install(monkeypatch, FakeCuda(largest_block=0, capacity=600 * MIB, missing=missing))
    with (
        CudaDriver() as driver,
        pytest.raises(
            OutOfMemoryError,
            match=r"weights need 1000 MiB of GPU memory and 600 MiB are free.*reboot",
        ),
    ):
        allocate_arena(driver, [1000 * MIB], "weights")
    assert fake.num_bytes == 0


def test_a_board_has_free_what_its_host_calls_available(monkeypatch) -> None:
    fake = FakeCuda(largest_block=0, capacity=600 * MIB, missing={"cuMemCreate"})
    fake.attributes[18] = 1  # integrated: cuMemGetInfo counts the page cache as taken
    monkeypatch.setattr(survey, "available_memory_bytes", lambda: 700 * MIB)
    install(monkeypatch, fake)
    with (
        CudaDriver() as driver,
        pytest.raises(OutOfMemoryError, match=r"need 1000 MiB of GPU memory and 700 MiB are free"),
    ):
        allocate_arena(driver, [1000 * MIB], "weights")


def test_what_chunks_took_is_given_back_when_one_fails(monkeypatch) -> None:
    monkeypatch.setattr("device_runtime.backends.cuda.arena.CHUNK_BYTES", MIB)
    fake = install(monkeypatch, FakeCuda(largest_block=MIB, capacity=2 * MIB))
    with CudaDriver() as driver, pytest.raises(OutOfMemoryError):
        allocate_arena(driver, [MIB, MIB, MIB], "weights")
    assert fake.num_bytes == 0


def test_a_failure_that_is_not_memory_is_told_at_once(monkeypatch) -> None:
    fake = install(monkeypatch, FakeCuda(failing={"cuMemAlloc_v2": 719}))
    with CudaDriver() as driver, pytest.raises(DeviceError, match=r"cuMemAlloc_v2 failed.*719"):
        allocate_arena(driver, [MIB], "weights")
    assert "cuMemCreate" not in fake.calls


def test_groups_hold_whole_regions() -> None:
    assert CHUNK_BYTES == 512 * MIB
    assert group_regions([100, 100, 300, 1000, 256], 512) == [[100, 100], [300], [1000], [256]]
    assert group_regions([], 512) == []
