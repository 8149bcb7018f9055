"""When BLAS runs on one thread and when it tries them all again."""

import time

import numpy as np
import pytest

from device_runtime.backends.reference import blas_threads
from device_runtime.backends.reference.blas_threads import ThreadGovernor, make_governor


def governor(cores=4):
    used = []
    return ThreadGovernor(used.append, cores), used


def run(made, shares):
    """The threads each piece of work ran on."""
    threads = []
    for share in shares:
        threads.append(made.num_threads)
        made.learn(share)
    return threads


def test_undisturbed_work_stays_on_all_threads() -> None:
    made, used = governor()
    assert run(made, [1.0, 0.9, 0.75] * 10) == [4] * 30
    assert used == []


def test_disturbed_work_is_followed_by_eight_pieces_on_one_thread_and_a_trial() -> None:
    made, used = governor()
    assert run(made, [0.4, *[1.0] * 8, 1.0, 1.0]) == [4, *[1] * 8, 4, 4]
    assert used == [1, 4]


def test_the_pause_doubles_with_every_failed_trial_and_starts_again_after_a_good_one() -> None:
    made, _ = governor()
    shares = [0.3, *[1.0] * 8, 0.3, *[1.0] * 16, 0.3, *[1.0] * 32, 1.0, 0.3, *[1.0] * 8, 1.0]
    expected = [4, *[1] * 8, 4, *[1] * 16, 4, *[1] * 32, 4, 4, *[1] * 8, 4]
    assert run(made, shares) == expected


def test_the_pause_has_an_end() -> None:
    made, _ = governor()
    threads = run(made, [0.3 if n == 0 else 1.0 for n in range(3)])
    for _ in range(20):
        while made.num_threads == 1:
            made.learn(1.0)
        made.learn(0.1)
    threads = run(made, [1.0] * 513)
    assert threads == [1] * 512 + [4]


def test_no_trial_while_even_one_thread_has_to_wait() -> None:
    made, _ = governor()
    assert run(made, [0.3, *[0.5] * 30, 0.95, 1.0]) == [4, *[1] * 30, 1, 4]


def test_work_is_judged_by_its_processor_time() -> None:
    made, _ = governor()
    made.begin()
    time.sleep(0.02)  # as if other programs had the processor
    made.mark()
    assert made.num_threads == 1


def test_what_came_before_a_step_and_what_is_too_short_does_not_count() -> None:
    made, _ = governor()
    time.sleep(0.02)
    made.begin()
    made.mark()
    assert made.num_threads == 4


def test_the_users_setting_stays(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert make_governor().num_threads == 1  # of this governor: it never calls anyone


def test_without_openblas_nothing_is_changed(monkeypatch, tmp_path) -> None:
    for name in blas_threads._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(blas_threads, "_MAPS", tmp_path / "missing")
    assert make_governor().num_threads == 1
    (tmp_path / "maps").write_text(f"0-1 r-xp 0 0 0 {tmp_path}/libopenblas.so\n")
    monkeypatch.setattr(blas_threads, "_MAPS", tmp_path / "maps")
    assert make_governor().num_threads == 1


@pytest.mark.parametrize("cores", [1, 2])
def test_numpys_own_openblas_is_found(monkeypatch, cores) -> None:
    for name in blas_threads._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert np.__version__  # loading numpy loads its BLAS
    setter = blas_threads._find_setter()
    if setter is None:
        pytest.skip("this numpy is not built on OpenBLAS; the wheels of PyPI are")
    setter(1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert make_governor().num_threads == cores
    setter(1)
