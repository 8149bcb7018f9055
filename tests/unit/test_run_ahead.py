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


def depths(most, *intervals_s, clock=None):
    """The depth after each of some steps, others outstanding meanwhile."""
    clock = clock or Clock()
    watch = RunAhead(most, clock)
    watch.collected(is_more=True)
    found = []
    for interval_s in intervals_s:
        clock.now_s += interval_s
        watch.collected(is_more=True)
        found.append(watch.num_steps)
    return found


# 10 ms are covered: by one step of 10 ms or more, two of 5 to 10 ms, else by all three.
@pytest.mark.parametrize(
    ("step_s", "depth"),
    [(0.0, 3), (5e-4, 3), (4e-3, 3), (6e-3, 2), (0.011, 1), (0.04, 1), (1.0, 1)],
)
def test_queued_steps_cover_ten_milliseconds_of_the_host(step_s, depth) -> None:
    assert depths(3, *[step_s] * 20) == [depth] * 20
    assert depths(0, *[step_s] * 3) == [0, 0, 0]  # a backend that cannot
    assert RunAhead(3).num_steps == 3  # before anything is known


def test_a_host_that_was_late_queues_deeper_for_a_while() -> None:
    # Two steps of 40 ms were done when it came back after 100 ms: the second is there at once.
    found = depths(3, 0.04, 0.1, 1e-4, *[0.04] * 9)
    assert found == [1, 1, 3, *[3] * 7, 1, 1]


def test_one_long_step_among_short_ones_changes_nothing() -> None:
    assert depths(3, 1e-3, 0.5, 1e-3, 0.5) == [3] * 4  # prompts between decode steps


def test_the_time_between_two_answers_is_no_step() -> None:
    clock = Clock()
    watch = RunAhead(3, clock)
    watch.collected(is_more=False)
    clock.now_s += 60
    watch.collected(is_more=True)
    assert watch.num_steps == 3
    clock.now_s += 0.04
    watch.collected(is_more=True)
    assert watch.num_steps == 1


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
