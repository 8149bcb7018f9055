"""Commands that run one after another or at once, each with a limit; what they leave in a folder.

A step's output goes to NAME.out and NAME.err, how it ended to steps/NAME.json as soon as it has
ended: a run that is cut off loses what was running and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSED = (0, 5)
"""Exit codes of a step that did; 5 is pytest's for a file that is skipped as a whole."""
CUT_OFF = "cut off"
"""How the reason begins where a step was ended with the run, not by its own limit."""
GONE_S = 30.0
"""Seconds that a process may take to be gone."""
STATES = "steps"
"""Folder of how each step ended."""


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: of the step.
        command: what runs, in the repository's root.
        environment: added to this process's.
        expected_s: seconds that it takes; it is not started where fewer are left.
        timeout_s: after which it is ended.
        results: files that it leaves in the folder beside its output.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    expected_s: float
    timeout_s: float
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """How a step ended; ``why`` is empty when it ran to its end."""

    exit_code: int | None
    seconds: float
    why: str = ""

    @property
    def is_passed(self) -> bool:
        """Whether nothing failed."""
        return self.exit_code in PASSED

    @property
    def is_cut_off(self) -> bool:
        """Whether it was ended with the run, so that it has to run again."""
        return self.why.startswith(CUT_OFF)


@dataclass
class Runner:
    """Runs steps until a moment; `stop` ends those that run, and no other one starts.

    Attributes:
        folder: where everything goes.
        end: of the time, by `time.monotonic`.
    """

    folder: Path
    end: float = float("inf")
    _running: set[int] = field(default_factory=set)
    _why: str = ""
    _num_threads: str = "4"

    def run_all(self, steps: Iterable[Step], num_workers: int) -> None:
        """Run steps, several at once, the first ones first."""
        (self.folder / STATES).mkdir(parents=True, exist_ok=True)
        self._num_threads = str(max(4, (os.cpu_count() or 1) // max(1, num_workers)))
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            waiting = {pool.submit(self.run, step) for step in steps}
            while waiting:
                # Not for longer: a signal that another thread gets does not wake this one, which
                # is the one that runs its handler.
                done, waiting = wait(waiting, 0.2, FIRST_EXCEPTION)
                for future in done:
                    future.result()

    def run(self, step: Step) -> State | None:
        """Run a step and tell it in a line; None where there was no time to start it."""
        left = self.end - time.monotonic()
        if self._why or left < step.expected_s:
            reason = self._why or f"{max(0.0, left):.0f} s left of {step.expected_s:.0f} it needs"
            _tell(f"     --    {step.name}: not started, {reason}")
            return None
        forget(self.folder, step)
        state = self._run(step, left)
        text = json.dumps(asdict(state))
        (self.folder / STATES / f"{step.name}.json").write_text(text, encoding="utf-8")
        word = state.why or f"exit code {state.exit_code}"
        _tell(f"{state.seconds:6.1f} s  {step.name}: {word}")
        return state

    def stop(self, signal_name: str) -> None:
        """End what runs, with what it has started."""
        self._why = f"{CUT_OFF} by {signal_name}"
        for group in list(self._running):
            _kill(group)

    def _run(self, step: Step, left_s: float) -> State:
        start = time.monotonic()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), self._num_threads)
        with (
            (self.folder / f"{step.name}.out").open("wb") as out,
            (self.folder / f"{step.name}.err").open("wb") as err,
        ):
            try:
                process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env=os.environ | threads | step.environment,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except OSError as error:
                return State(None, 0.0, str(error))
            self._running.add(process.pid)
            if self._why:  # it came between the look at it and the start
                _kill(process.pid)
            why = ""
            try:
                process.wait(min(step.timeout_s, left_s))
            except subprocess.TimeoutExpired:
                why = f"ended after {step.timeout_s:.0f} s"
                if left_s < step.timeout_s:
                    why = f"{CUT_OFF} after {left_s:.0f} s"
                # With what it has started, which would hold the device against the steps after it.
                _kill(process.pid)
                with suppress(subprocess.TimeoutExpired):  # where the driver holds it, go on
                    process.wait(GONE_S)
            self._running.discard(process.pid)
        why = why or self._why
        return State(None if why else process.returncode, round(time.monotonic() - start, 1), why)


def forget(folder: Path, step: Step) -> None:
    """Remove what an earlier run of a step left."""
    for name in (f"{STATES}/{step.name}.json", *step.results):
        (folder / name).unlink(missing_ok=True)


def read_states(folder: Path) -> dict[str, State]:
    """Return how the steps of a folder ended, by name."""
    return {
        path.stem: State(**json.loads(path.read_text(encoding="utf-8")))
        for path in sorted((folder / STATES).glob("*.json"))
    }


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
