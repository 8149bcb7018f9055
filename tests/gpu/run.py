"""Runs everything that needs a GPU and writes tests/gpu/record.json; scripts/test-gpu starts it.

Correctness first, several processes at once: each file of tests/gpu with both variants of the
kernels, the self test, compute-sanitizer. Then, alone on the device, the real model and the
benchmarks. A step that fails or runs out of time is told in the record and stops nothing; a run
that is cut off goes on with --continue.
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
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE)]

import bench  # noqa: E402
import emulated  # noqa: E402
from gpu_record import PLAN, RECORD, SANITIZER_ERRORS, results_file  # noqa: E402
from steps import STATES, Runner, State, Step, read_states  # noqa: E402
from write_record import commit, write  # noqa: E402

from device_runtime.backends.cuda.graph_set import EAGER_VARIABLE  # noqa: E402
from device_runtime.backends.cuda.kernel_set import PLAIN_VARIABLE  # noqa: E402
from device_runtime.errors import TurbojetError  # noqa: E402

VARIANTS: dict[str, dict[str, str]] = {"default": {}, "plain": {PLAIN_VARIABLE: "1"}}
ALONE = ("test_process_end.py", "test_real_model.py")
"""They fill the device's memory or look at how much is free."""
SECONDS = {"test_real_model.py": (150, 400), "test_layer_streaming.py": (90, 300)}
"""That a file is expected to take, and may, where others have 40 and 240."""
WITHOUT_KERNELS = ("test_fused_blocks.py", "test_layer_streaming.py")
"""Of quantization on a GPU: there are no variants of it."""
CLI = [sys.executable, "-m", "device_runtime.cli"]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short"]
QUANTIZED = {"internlm2-1.8b": (80, 240), "llama-2-7b": (200, 400), "internlm2-20b": (400, 570)}
"""Seconds that scripts/measure-quantize is expected to take, and may."""
_RECORD_S = 5
"""Seconds of a limited run that are kept for writing the record."""


def test_step(folder: Path, file: str, variant: str) -> Step:
    """Return the run of one file with one variant of the kernels."""
    name = f"{variant}-{Path(file).stem}"
    command = [*PYTEST, f"tests/gpu/{file}", *emulated.selection(file)]
    environment = VARIANTS[variant] | results_of(folder, name)
    seconds = SECONDS.get(file, (40, 240))
    return Step(name, command, environment, *seconds, (results_file(name),))


def results_of(folder: Path, name: str) -> dict[str, str]:
    """Return what makes pytest tell the outcomes of a step, and fail where it finds no GPU."""
    return {"TURBOJET_GPU_RESULTS": str(folder / results_file(name))}


def sanitizer(tool: str) -> list[str]:
    """Return how a command begins that compute-sanitizer watches."""
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return [path, "--tool", tool, "--error-exitcode", str(SANITIZER_ERRORS)]


def sanitizer_engine_step(folder: Path, tool: str) -> Step:
    """Return prompts and steps of the whole backend, launched singly: tools see no graphs."""
    command = [*sanitizer(tool), *PYTEST, "tests/gpu/test_cuda_backend.py", "-k", "greedy_tokens"]
    name = f"sanitizer-{tool}-engine"
    environment = {EAGER_VARIABLE: "1"} | results_of(folder, name)
    return Step(name, command, environment, 60, 240, (results_file(name),))


def correctness_steps(folder: Path, variants: Sequence[str]) -> list[Step]:
    """Return what may share the device, the longest first."""
    steps = [
        Step(f"sanitizer-{tool}-kernels", [*sanitizer(tool), *CLI, "selftest"], {}, 60, 240)
        for tool in ("memcheck", "racecheck")
    ]
    steps.append(sanitizer_engine_step(folder, "memcheck"))
    files = sorted(path.name for path in HERE.glob("test_*.py") if path.name not in ALONE)
    for variant in variants:
        command = [*CLI, "selftest", "--json"]
        limit_s = 120 * emulated.SLOWER
        steps.append(Step(f"selftest-{variant}", command, VARIANTS[variant], 20, limit_s))
        steps += [
            test_step(folder, file, variant)
            for file in files
            if variant == variants[0] or file not in WITHOUT_KERNELS
        ]
    return steps


def alone_steps(folder: Path, variants: Sequence[str]) -> list[Step]:
    """Return what has the device to itself: what looks at its memory, then what takes times."""
    steps = [test_step(folder, file, variant) for file in ALONE for variant in variants]
    steps.append(sanitizer_engine_step(folder, "racecheck"))  # it takes much of the host's memory
    for run in bench.RUNS:
        command = [sys.executable, str(HERE / "bench.py"), str(folder / "bench")]
        command += ["--no-table", "--only", run.name]
        limit = 3 * run.expected_s + 30
        environment = emulated.CLOCK
        results = (f"bench/{run.name}.json",)
        name = f"bench-{run.name}"
        steps.append(Step(name, command, environment, run.expected_s, limit, results))
    return steps


def quantize_steps(folder: Path) -> list[Step]:
    """Return what times quantization."""
    command = [sys.executable, "-m", "host_tools.measure_quantize"]
    command += ["--output", str(folder / "quantize")]
    return [
        Step(f"quantize-{model}", [*command, "--model", model], {}, *seconds)
        for model, seconds in QUANTIZED.items()
    ]


def build_kernels(folder: Path, sm: int) -> list[str]:
    """Compile the kernels for the device into the folder; return the variants that it has."""
    from device_runtime.kernels.cubins import read_record

    kernels = folder / "kernels"
    if emulated.IS_ON:
        emulated.write_cubins(kernels)
    else:
        command = [sys.executable, "-m", "host_tools.cli", "kernels", "--sm", str(sm)]
        subprocess.run([*command, "--output", str(kernels)], cwd=ROOT, check=True)
    kinds = {cubin.is_plain for cubin in read_record(kernels)}
    return [variant for variant in VARIANTS if (variant == "plain") in kinds]


def describe_machine() -> dict[str, object]:
    """Return what the driver says of the device."""
    from device_runtime.backends.cuda.driver import open_driver
    from device_runtime.backends.cuda.nvml import driver_version
    from device_runtime.backends.cuda.probe import device_facts

    with open_driver() as driver:
        facts = asdict(device_facts(driver))
    return facts | {"driver_version": driver_version(), "python": sys.version.split()[0]}


def prepare(folder: Path) -> list[str]:
    """Describe the machine, compile the kernels, drop what ran with others; return the variants."""
    from device_runtime.kernels.cubins import read_record

    machine = describe_machine()
    facts = machine | {"commit": commit()}
    (folder / "machine.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    os.environ.setdefault("TURBOJET_CACHE_DIR", str(ROOT / ".cache"))
    os.environ["TURBOJET_KERNELS"] = str(folder / "kernels")
    before = {cubin.source: cubin.sources_sha256 for cubin in read_record(folder / "kernels")}
    variants = build_kernels(folder, int(str(machine["sm"])))
    now = {cubin.source: cubin.sources_sha256 for cubin in read_record(folder / "kernels")}
    if now != before:
        for name in (STATES, "bench", "quantize"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for path in folder.glob("results-*"):
            path.unlink()
    return variants


def matches(step: Step, patterns: Sequence[str]) -> bool:
    """Return whether a step's name is like one of the patterns."""
    return any(fnmatch(step.name, pattern) for pattern in patterns)


def finished(folder: Path) -> dict[str, State]:
    """Return how the steps ended that need not run again."""
    return {name: state for name, state in read_states(folder).items() if not state.is_cut_off}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/test-gpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", nargs="?", default="build/test-gpu", help="for logs and cubins")
    jobs = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes at once ({jobs})")
    parser.add_argument(
        "--record", type=Path, default=RECORD, help="where it goes (tests/gpu/record.json)"
    )
    parser.add_argument("--no-bench", action="store_true", help="leave the benchmarks out")
    parser.add_argument(
        "--quantize", action="store_true", help="also time quantization, which takes minutes more"
    )
    parser.add_argument(
        "--steps", nargs="+", metavar="PATTERN", help="only steps with such names, as bench-*"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="PATTERN", help="no steps with such names"
    )
    parser.add_argument(
        "--continue", dest="is_going_on", action="store_true", help="leave out what has run"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="end what runs after so many"
    )
    parser.add_argument("--list", action="store_true", help="tell the steps, run nothing")
    return parser


def main() -> int:
    """Run everything; return 1 where a step failed or is left."""
    end = time.monotonic()
    parser = build_parser()
    args = parser.parse_args()
    end += args.seconds - _RECORD_S
    folder = Path(args.folder).resolve()
    every = correctness_steps(folder, [*VARIANTS]) + alone_steps(folder, [*VARIANTS])
    if args.quantize or args.list:
        every += quantize_steps(folder)
    for pattern in (*(args.steps or ()), *args.without):
        if not any(matches(step, [pattern]) for step in every):
            hint = " (those of quantization need --quantize)" * (not args.quantize)
            parser.error(f"no step is called {pattern}{hint}; --list tells all")
    for name in (PLAIN_VARIABLE, EAGER_VARIABLE):
        if os.environ.get(name):
            parser.error(f"{name} is set, and every step would run so; unset it")
    if args.list:
        for step in every:
            print(f"{step.expected_s:4.0f} s of at most {step.timeout_s:3.0f}  {step.name}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)

    try:
        variants = prepare(folder)
    except TurbojetError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:  # it has said why
        return error.returncode
    shared, alone = correctness_steps(folder, variants), alone_steps(folder, variants)
    if args.no_bench:
        alone = [step for step in alone if not step.name.startswith("bench-")]
    if args.quantize:
        alone += quantize_steps(folder)
    plan = [step.name for step in (*shared, *alone)]
    (folder / PLAN).write_text(json.dumps(plan), encoding="utf-8")
    states = finished(folder)
    runner = Runner(folder, end)

    def stop(number: int, frame: FrameType | None) -> None:
        runner.stop(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, stop)
    for steps, num_workers in ((shared, args.jobs), (alone, 1)):
        wanted = [
            step
            for step in steps
            if matches(step, args.steps or ["*"])
            and not matches(step, args.without)
            and not (args.is_going_on and step.name in states)
        ]
        runner.run_all(wanted, num_workers)
    write([folder], args.record)
    states = finished(folder)
    # A sanitizer that is missing or cannot attach is told in the record and fails nothing.
    missing = [name for name in plan if name not in states]
    if missing:
        print(f"left for a run with --continue: {', '.join(missing)}")
    failed = [
        name
        for name, state in states.items()
        if not state.is_passed
        and (not name.startswith("sanitizer-") or state.exit_code == SANITIZER_ERRORS)
    ]
    return int(bool(failed or missing))


if __name__ == "__main__":
    sys.exit(main())
