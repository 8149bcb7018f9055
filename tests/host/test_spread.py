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


def test_the_most_expensive_comes_first_and_the_idlest_device_takes_it() -> None:
    with Spread([CPU, CPU], {"o": 1.0, "qkv": 3.0, "gate_up": 5.0, "down": 6.0}) as spread:
        assert spread.places(["qkv", "o"]) == {"qkv": 0, "o": 1}
        # down to the first, gate_up to the second, which then has less to do: qkv as well.
        places = spread.places(["qkv", "o", "gate_up", "down"])
    assert places == {"down": 0, "gate_up": 1, "qkv": 1, "o": 0}


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_jobs_give_their_results_in_the_order_of_the_jobs(num_devices: int) -> None:
    threads = []

    def job(result: int, device: torch.device) -> int:
        assert (device, torch.is_grad_enabled()) == (CPU, False)
        threads.append(threading.get_ident())
        return result

    costs = {"a": 1.0, "b": 3.0, "c": 2.0}
    with torch.no_grad(), Spread([CPU] * num_devices, costs) as spread:
        for _ in range(2):
            found = spread.run({key: partial(job, ord(key)) for key in "acb"})
            assert list(found.items()) == [("a", 97), ("c", 99), ("b", 98)]
    assert len(set(threads)) == num_devices


def test_two_devices_work_side_by_side() -> None:
    both = threading.Barrier(2, timeout=10)
    with Spread([CPU, CPU], {"a": 1.0, "b": 1.0}) as spread:
        assert len(spread.run({key: lambda device: both.wait() for key in "ab"})) == 2


@pytest.mark.parametrize("num_devices", [1, 2])
def test_what_a_job_raises_reaches_the_caller(num_devices: int) -> None:
    def fail(device: torch.device) -> None:
        raise PackageError("scales of v reach 1e9")

    with Spread([CPU] * num_devices, {"a": 1.0, "b": 1.0}) as spread:
        with pytest.raises(PackageError, match="scales of v reach 1e9"):
            spread.run({"a": lambda device: None, "b": fail})
        assert spread.run({"a": lambda device: 1}) == {"a": 1}


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
