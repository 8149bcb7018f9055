"""What runs beside the forward pass: searches on several devices, the writer, and their times."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from device_runtime.errors import DeviceError, PackageError
from host_tools.layer_writer import LayerWriter
from host_tools.phase_times import FORWARD, SEARCH, PhaseTimes
from host_tools.spread import Spread

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_jobs_give_their_results_in_the_order_of_the_jobs(num_devices: int) -> None:
    def job(result: int, device: torch.device) -> int:
        assert (device, torch.is_grad_enabled()) == (CPU, False)
        return result

    with torch.no_grad(), Spread([CPU] * num_devices) as spread:
        for _ in range(2):
            found = spread.run({key: partial(job, ord(key)) for key in "acb"})
            assert list(found.items()) == [("a", 97), ("c", 99), ("b", 98)]


def test_one_device_computes_in_the_callers_thread() -> None:
    with Spread([CPU]) as spread:
        found = spread.run({key: lambda device: threading.get_ident() for key in "ab"})
    assert set(found.values()) == {threading.get_ident()}


@pytest.mark.parametrize("num_devices", [2, 4])
def test_all_devices_work_side_by_side(num_devices: int) -> None:
    # torch takes cpu:0 and cpu:1 for two devices.
    devices = [torch.device("cpu", index) for index in range(num_devices)]
    all_of_them, busy = threading.Barrier(num_devices, timeout=10), []

    def job(device: torch.device) -> None:
        busy.append(device)
        all_of_them.wait()

    with Spread(devices) as spread:
        spread.run(dict.fromkeys(range(2 * num_devices), job))
    assert sorted(busy, key=str) == sorted(devices * 2, key=str)


def test_a_device_that_is_done_takes_the_next_job() -> None:
    may_end, others = threading.Event(), []

    def long(device: torch.device) -> None:
        assert may_end.wait(10)

    def short(device: torch.device) -> None:
        others.append(device)
        if len(others) == 3:
            may_end.set()

    with Spread([CPU, torch.device("cpu", 0)]) as spread:
        spread.run({"long": long, "a": short, "b": short, "c": short})
    assert len(set(others)) == 1


@pytest.mark.parametrize("num_devices", [1, 2])
def test_what_a_job_raises_reaches_the_caller(num_devices: int) -> None:
    def fail(device: torch.device) -> None:
        raise PackageError("scales of v reach 1e9")

    with Spread([CPU] * num_devices) as spread:
        with pytest.raises(PackageError, match="scales of v reach 1e9"):
            spread.run({"a": lambda device: None, "b": fail})
        assert spread.run({key: lambda device: 1 for key in "abc"}) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("is_threaded", [False, True])
def test_a_writer_stores_in_order_and_one_beside_the_caller(is_threaded: bool) -> None:
    stored: list[tuple[int, bool]] = []
    caller = threading.get_ident()

    def store(content: int) -> None:
        stored.append((content, threading.get_ident() == caller))

    times = PhaseTimes()
    with LayerWriter(store, times, is_threaded=is_threaded) as writer:
        for content in range(4):
            writer.put(content)
            # No more than the last one may be under way.
            assert len(stored) >= content
        writer.drain()
        assert stored == [(content, not is_threaded) for content in range(4)]
    assert ("waiting" in times.shares()["seconds"]) == is_threaded


@pytest.mark.parametrize("is_threaded", [False, True])
def test_what_storing_raises_reaches_the_caller(is_threaded: bool) -> None:
    def store(content: int) -> None:
        raise DeviceError("cannot write: disk full")

    writer = LayerWriter(store, PhaseTimes(), is_threaded=is_threaded)
    with pytest.raises(DeviceError, match="disk full"), writer:
        writer.put(1)
        writer.drain()


def test_phases_add_up_and_threads_are_kept_apart() -> None:
    now = [0.0]
    times = PhaseTimes(lambda: now[0])

    def spend(name: str, seconds: float) -> None:
        with times.phase(name) as span:
            now[0] += seconds
        assert span.seconds_s == seconds

    spend(SEARCH, 30.0)
    spend(FORWARD, 10.0)
    spend(SEARCH, 45.0)
    thread = threading.Thread(target=spend, args=("packing", 0.0))
    thread.start()
    thread.join()
    now[0] += 15.0
    assert times.shares() == {
        "seconds": {"search": 75.0, "forward": 10.0, "other": 15.0, "total": 100.0},
        "seconds_beside": {"packing": 0.0},
    }
    assert times.summary("quantize") == (
        "quantize took 1 min 40 s: search 1 min 15 s (75%), other 15 s (15%), forward 10 s (10%)"
    )


def test_the_summary_names_what_ran_beside() -> None:
    now = [0.0]
    times = PhaseTimes(lambda: now[0])

    def pack() -> None:
        with times.phase("packing"):
            now[0] += 4.0

    thread = threading.Thread(target=pack)
    thread.start()
    thread.join()
    assert times.summary("quantize") == (
        "quantize took 4.0 s: other 4.0 s (100%); beside it packing 4.0 s"
    )


def test_a_phase_that_fails_counts() -> None:
    now = [0.0]
    times = PhaseTimes(lambda: now[0])
    with pytest.raises(KeyError), times.phase(SEARCH):
        now[0] += 2.0
        raise KeyError
    assert times.shares()["seconds"]["search"] == 2.0
