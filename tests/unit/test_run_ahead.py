"""How deep steps are queued follows from how long they take."""

import math

import pytest
from fake_backend import FakeBackend, expected_answer
from test_engine_run_ahead import make_engine
from tiny_package import make_package

from device_runtime.engine import engine as engine_module
from device_runtime.engine.generation import GenerationParams
from device_runtime.engine.run_ahead import RunAhead
from device_runtime.package_format.package import open_package

PROMPT = [5, 6, 7]


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def depths(most, *steps, clock=None, is_more=True):
    """The depth after each step: (seconds until the host asks for it, seconds it waits then)."""
    clock = clock or Clock()
    run_ahead = RunAhead(most, clock)
    found = []
    for late_s, wait_s in ((0, 0), *steps):
        clock.now_s += late_s

        def collect(wait_s=wait_s) -> list[tuple[int, int]]:
            clock.now_s += wait_s
            return []

        assert run_ahead.collect(collect, is_more=is_more) == []
        found.append(run_ahead.num_steps)
    return found[1:]


# 10 ms are covered: by one step of 10 ms or more, two of 5 to 10 ms, else by all three.
@pytest.mark.parametrize(
    ("step_s", "depth"),
    [(0.0, 3), (5e-4, 3), (4e-3, 3), (6e-3, 2), (0.011, 1), (0.04, 1), (1.0, 1)],
)
def test_queued_steps_cover_ten_milliseconds_of_the_host(step_s, depth) -> None:
    assert depths(3, *[(step_s / 9, step_s * 8 / 9)] * 20) == [depth] * 20
    assert depths(0, *[(0, step_s)] * 3) == [0, 0, 0]  # a backend that cannot
    assert RunAhead(3).num_steps == 3  # before anything is known


def test_a_host_that_was_late_queues_deeper_for_a_while() -> None:
    step = (1e-3, 0.039)
    # Late by two steps of 40 ms: what it asks for is there at once. Eight steps later all is well.
    assert depths(3, step, (0.1, 1e-4), *[step] * 9) == [1, *[3] * 8, 1, 1]


def test_a_long_step_among_short_ones_changes_nothing() -> None:
    prompt, decode = (0, 0.5), (0, 2e-3)
    assert depths(3, decode, prompt, decode, prompt) == [3] * 4


def test_time_in_which_nothing_was_queued_is_no_step() -> None:
    assert depths(3, (60, 0.04), (60, 0.04), is_more=False) == [3, 3]


class SlowBackend(FakeBackend):
    """Each step takes its time, and no two run at once."""

    def __init__(self, clock: Clock, step_s: float) -> None:
        super().__init__(3, stops=False)
        self.clock = clock
        self.step_s = step_s
        self.free_s = -math.inf

    def submit(self, batch) -> None:
        super().submit(batch)
        self.free_s = max(self.free_s, self.clock.now_s) + self.step_s
        ids, drawn = self.outstanding.pop()
        self.outstanding.append((ids, (self.free_s, drawn)))

    def collect(self):
        done_s, drawn = super().collect()
        self.clock.now_s = max(self.clock.now_s, done_s)
        return drawn


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return open_package(make_package(tmp_path_factory.mktemp("slow") / "p").root)


# The steps that are outstanding when it comes, then its own.
@pytest.mark.parametrize(("step_s", "num_steps"), [(0.04, 1 + 1), (1e-3, 3 + 1)])
def test_a_sequence_that_joins_waits_for_few_slow_steps(
    package, monkeypatch, step_s, num_steps
) -> None:
    clock = Clock()
    monkeypatch.setattr(engine_module, "RunAhead", lambda most: RunAhead(most, clock))
    engine = make_engine(package, SlowBackend(clock, step_s))
    first = engine.generate(PROMPT, GenerationParams(max_tokens=60))
    tokens = [token for _ in range(20) for token in next(first).token_ids]
    started_s = clock.now_s
    second = engine.generate([9, 8], GenerationParams(max_tokens=4))
    other = list(next(second).token_ids)
    assert round((clock.now_s - started_s) / step_s) == num_steps
    other += [token for output in second for token in output.token_ids]
    tokens += [token for output in first for token in output.token_ids]
    assert tokens == expected_answer(PROMPT, 60, stops=False)
    assert other == expected_answer([9, 8], 4, stops=False)
    engine.check_integrity()
