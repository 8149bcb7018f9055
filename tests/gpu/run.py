"""Runs everything that needs a GPU and writes tests/gpu/record.json; scripts/test-gpu starts it.

Correctness first, several processes at once: each file of tests/gpu with both variants of the
kernels, the self test, compute-sanitizer. Then, alone on the device, the real model and the
benchmarks. A step that fails or runs out of time is told in the record and stops nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from gpu_record import SANITIZER_ERRORS  # noqa: E402

PLAIN = {"TURBOJET_PLAIN_KERNELS": "1"}
VARIANTS: dict[str, dict[str, str]] = {"default": {}, "plain": PLAIN}
ALONE = ("test_process_end.py", "test_real_model.py")
"""They fill the device's memory or look at how much is free."""
WITHOUT_KERNELS = ("test_fused_blocks.py", "test_layer_streaming.py")
"""Of quantization on a GPU: there are no variants of it."""
CLI = [sys.executable, "-m", "device_runtime.cli"]
PASSED = (0, 5)
"""Exit codes of a step that did; 5 is pytest's for a file that is skipped as a whole."""
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short"]


@dataclass(frozen=True)
class Step:
    """A command whose output goes to NAME.out and NAME.err.

    Attributes:
        name: of the step.
        command: what runs, in the repository's root.
        environment: added to this process's.
        timeout_s: after which it is ended.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    timeout_s: float


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


def run_step(step: Step, folder: Path) -> State:
    """Run a step and tell it in a line."""
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}
    with (
        (folder / f"{step.name}.out").open("wb") as out,
        (folder / f"{step.name}.err").open("wb") as err,
    ):
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment | step.environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            code = process.wait(step.timeout_s)
            state = State(code, round(time.monotonic() - start, 1))
        except subprocess.TimeoutExpired:
            # With what it has started, which would hold the device against the steps after it.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            why = f"ended after {step.timeout_s:.0f} s"
            state = State(None, round(time.monotonic() - start, 1), why)
        except OSError as error:
            state = State(None, 0.0, str(error))
    word = state.why or f"exit code {state.exit_code}"
    sys.stdout.write(f"{state.seconds:6.1f} s  {step.name}: {word}\n")
    sys.stdout.flush()
    return state


def run_steps(steps: Iterable[Step], folder: Path, num_workers: int) -> dict[str, State]:
    """Run steps, several at once, the first ones first."""
    listed = list(steps)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        states = pool.map(lambda step: run_step(step, folder), listed)
        return {step.name: state for step, state in zip(listed, states, strict=True)}


def test_step(file: str, variant: str, folder: Path, timeout_s: float) -> Step:
    """Return the run of one file with one variant of the kernels."""
    name = f"{variant}-{Path(file).stem}"
    results = {"TURBOJET_GPU_RESULTS": str(folder / f"results-{name}.json")}
    return Step(name, [*PYTEST, f"tests/gpu/{file}"], VARIANTS[variant] | results, timeout_s)


def correctness_steps(folder: Path, variants: list[str]) -> list[Step]:
    """Return what may share the device, the longest first."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    steps = []
    for tool in ("memcheck", "racecheck"):
        check = [sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_ERRORS)]
        steps.append(Step(f"sanitizer-{tool}-kernels", [*check, *CLI, "selftest"], {}, 240))
        # A prompt and decode steps of the whole backend, launched one by one: the tool cannot look
        # into graphs.
        engine = [*check, *PYTEST, "tests/gpu/test_cuda_backend.py", "-k", "greedy_tokens"]
        steps.append(Step(f"sanitizer-{tool}-engine", engine, {"TURBOJET_EAGER": "1"}, 240))
    files = sorted(path.name for path in HERE.glob("test_*.py") if path.name not in ALONE)
    for variant in variants:
        environment = VARIANTS[variant]
        command = [*CLI, "selftest", "--json"]
        steps.append(Step(f"selftest-{variant}", command, environment, 120))
        steps += [
            test_step(file, variant, folder, 240)
            for file in files
            if variant == variants[0] or file not in WITHOUT_KERNELS
        ]
    return steps


def build_kernels(folder: Path, sm: int) -> list[str]:
    """Compile the kernels for the device into the folder; return the variants that it has."""
    from device_runtime.kernels.cubins import read_record

    command = [sys.executable, "-m", "host_tools.cli", "kernels", "--sm", str(sm)]
    subprocess.run([*command, "--output", str(folder / "kernels")], cwd=ROOT, check=True)
    kinds = {cubin.is_plain for cubin in read_record(folder / "kernels")}
    return [variant for variant in VARIANTS if (variant == "plain") in kinds]


def describe_machine() -> dict[str, object]:
    """Return what the driver says of the device."""
    from device_runtime.backends.cuda.driver import open_driver
    from device_runtime.backends.cuda.nvml import driver_version
    from device_runtime.backends.cuda.probe import device_facts

    with open_driver() as driver:
        facts = asdict(device_facts(driver))
    return facts | {"driver_version": driver_version(), "python": sys.version.split()[0]}


def main() -> int:
    """Run everything; return 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="build/test-gpu", help="for logs and cubins")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--record", help="where the record goes (tests/gpu/record.json)")
    parser.add_argument("--no-bench", action="store_true", help="leave the benchmarks out")
    parser.add_argument(
        "--quantize", action="store_true", help="also time quantization, which takes minutes more"
    )
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)

    machine = describe_machine()
    (folder / "machine.json").write_text(json.dumps(machine, indent=1), encoding="utf-8")
    os.environ.setdefault("TURBOJET_CACHE_DIR", str(ROOT / ".cache"))
    variants = build_kernels(folder, int(str(machine["sm"])))
    os.environ["TURBOJET_KERNELS"] = str(folder / "kernels")
    states = run_steps(correctness_steps(folder, variants), folder, args.jobs)
    alone = [test_step(file, variant, folder, 240) for variant in variants for file in ALONE]
    if not args.no_bench:
        bench = {"PYTHON": sys.executable}
        alone.append(Step("bench", ["scripts/bench", str(folder / "bench")], bench, 420))
    if args.quantize:
        command = ["scripts/measure-quantize", "--output", str(folder / "quantize")]
        alone.append(Step("quantize", command, {"PYTHON": sys.executable}, 900))
    states |= run_steps(alone, folder, 1)
    facts = {name: asdict(state) for name, state in states.items()}
    (folder / "steps.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    command = [sys.executable, str(HERE / "write_record.py"), str(folder)]
    subprocess.run([*command, *([args.record] if args.record else [])], cwd=ROOT, check=True)
    # A sanitizer that is missing or cannot attach is told in the record and fails nothing.
    failed = [
        name
        for name, state in states.items()
        if not state.is_passed
        and (not name.startswith("sanitizer-") or state.exit_code == SANITIZER_ERRORS)
    ]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
