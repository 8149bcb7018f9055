"""The record of tests/gpu holds for the kernels as they are; what it says comes from a run."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gpu_record import RECORD, REFRESH, faults_of, read_record

from device_runtime.errors import DeviceError
from device_runtime.kernels.cubins import SOURCES, Cubin, write_record
from host_tools.kernels import sources_sha256

GPU_TESTS = RECORD.parent
NOW = {source: sources_sha256(source) for source in SOURCES}


@pytest.mark.skipif(not RECORD.is_file(), reason=f"tests/gpu has no record yet: {REFRESH}")
def test_the_record_is_of_these_kernels_and_everything_passed() -> None:
    faults = faults_of(read_record(), NOW)
    assert not faults, f"{'; '.join(faults)}: {REFRESH}"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(GPU_TESTS))
    return importlib.import_module(name)


def row(test: str, outcome: str = "passed", **figures: float) -> dict[str, Any]:
    return {
        "test": f"tests/gpu/test_a.py::{test}",
        "outcome": outcome,
        "reason": "",
        "figures": figures,
    }


def state(exit_code: int | None = 0, seconds: float = 2.0, why: str = "") -> dict[str, Any]:
    return {"exit_code": exit_code, "seconds": seconds, "why": why}


def write_rows(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_states(folder: Path, states: dict[str, dict[str, Any]]) -> None:
    (folder / "steps").mkdir(exist_ok=True)
    for name, facts in states.items():
        (folder / "steps" / f"{name}.json").write_text(json.dumps(facts))


STATES = {
    "sanitizer-memcheck-kernels": state(0, 9.0),
    "sanitizer-racecheck-kernels": state(None, 1.0, "ended after 1 s"),
    "selftest-default": state(),
    "selftest-plain": state(),
    "default-test_a": state(),
    "plain-test_a": state(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves behind."""
    return make_folder(tmp_path / "run")


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    write_states(folder, STATES)
    (folder / "plan.json").write_text(json.dumps([*STATES]))
    machine = {"name": "A GPU", "sm": 90, "commit": "abc"}
    (folder / "machine.json").write_text(json.dumps(machine))
    (folder / "sanitizer-memcheck-kernels.out").write_text(
        "hm\n========= ERROR SUMMARY: 0 errors\n"
    )
    for variant in ("default", "plain"):
        rows = [row("test_one[1]", error=1e-4), row("test_one[2]", error=3e-4), row("test_two")]
        started = [{"test": made["test"], "outcome": "started"} for made in rows]
        write_rows(folder / f"results-{variant}-test_a.jsonl", *started, *rows)
        checks = [{"name": "rms_norm_f16", "is_passed": True}]
        (folder / f"selftest-{variant}.out").write_text(
            json.dumps({"device": "A GPU", "seconds": 2.0, "checks": checks})
        )
    write_kernels(folder, NOW)
    names = "prompt_tokens completion_tokens concurrency rounds read_bytes_s ttft_s ttft_min_s"
    names += " ttft_max_s token_time_p50_s token_time_p99_s decode_tok_s decode_tok_s_min"
    names += " decode_tok_s_max share_of_read_bandwidth bytes_per_step"
    result = dict.fromkeys(names.split(), 1)
    bench = {"model": "m", "machine": {}, "memory": {}, "results": [result], "load": None}
    bench |= {"nodes": [{"name": "qkv"}], "slices": [], "projections": []}
    (folder / "bench").mkdir()
    (folder / "bench" / "a.json").write_text(json.dumps(bench))
    (folder / "bench" / "failed.json").write_text("")
    (folder / "quantize").mkdir()
    (folder / "quantize" / "a.json").write_text('{"seconds": 3}')
    return folder


def write_kernels(folder: Path, digests: dict[str, str]) -> None:
    (folder / "kernels").mkdir(exist_ok=True)
    write_record(
        folder / "kernels",
        [
            Cubin(f"{source}.cubin", source, 90, "13.0", 0, False, "", digest, "", ())
            for source, digest in digests.items()
        ],
    )


def test_a_record_says_what_passed_on_what(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = load("write_record", monkeypatch).make_record([folder])
    assert record["machine"] == {"name": "A GPU", "sm": 90}
    assert record["commit"] == "abc"
    assert record["compilers"] == ["NVRTC 13.0, sm_90"]
    plain = record["variants"]["plain"]
    assert plain["num_passed"] == 3
    assert plain["tests"] == {"tests/gpu/test_a.py": {"test_one": 2, "test_two": 1}}
    assert plain["figures"] == {"error": 3e-4}
    assert record["selftest"]["default"] == {"num_passed": 1, "failed": [], "seconds": 2.0}
    assert record["sanitizer"] == {
        "memcheck-kernels": "0 errors (exit code 0)",
        "racecheck-kernels": "no result: ended after 1 s",
    }
    bench = record["bench"]["a"]
    assert bench["nodes"] == [{"name": "qkv"}]
    assert "load" not in bench and "bytes_per_step" not in bench["results"][0]
    assert record["quantize"] == {"a": {"seconds": 3}}
    assert faults_of(record, NOW) == []


def test_what_failed_or_did_not_run_is_a_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "selftest-plain.out").unlink()
    (folder / "steps" / "plain-test_a.json").unlink()
    failed = {**row("test_one[1]", "failed"), "reason": "assert 1 == 2"}
    started = {"test": "tests/gpu/test_a.py::test_four", "outcome": "started"}
    path = folder / "results-default-test_a.jsonl"
    write_rows(path, failed, row("test_two", "skipped"), row("test_three"), started)
    with path.open("a") as file:
        file.write('{"test": "cut o')  # its process was ended
    record = load("write_record", monkeypatch).make_record([folder])
    default = record["variants"]["default"]
    assert default["num_skipped"] == 1
    assert [*default["failed"].values()] == ["it did not end", "assert 1 == 2"]
    assert faults_of(record, NOW) == [
        "tests/gpu/test_a.py::test_four failed with the default kernels",
        "tests/gpu/test_a.py::test_one[1] failed with the default kernels",
        "no test passed with the plain kernels",
        "self test with the plain kernels: it did not run to its end",
        "plain-test_a did not pass: it was not run",
    ]


def test_a_test_that_leaves_something_broken_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(folder / "results-plain-test_a.jsonl", row("test_one"), row("test_one", "failed"))
    record = load("write_record", monkeypatch).make_record([folder])
    assert list(record["variants"]["plain"]["failed"]) == ["tests/gpu/test_a.py::test_one"]
    assert record["variants"]["plain"]["num_passed"] == 0


def test_a_record_of_several_folders_takes_each_step_from_the_last_that_ran_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = make_folder(tmp_path / "later")
    for path in (later / "steps").iterdir():
        if path.stem != "plain-test_a":
            path.unlink()
    write_rows(later / "results-plain-test_a.jsonl", row("test_one[1]"))
    (later / "bench" / "b.json").write_bytes((later / "bench" / "a.json").read_bytes())
    (later / "selftest-default.out").write_text("not of a run that counts")
    write_record = load("write_record", monkeypatch)
    record = write_record.make_record([folder, later])
    assert record["variants"]["default"]["num_passed"] == 3
    assert record["variants"]["plain"]["num_passed"] == 1
    assert sorted(record["bench"]) == ["a", "b"]
    assert faults_of(record, NOW) == []

    write_kernels(later, NOW | {"head_f16": "another"})
    with pytest.raises(ValueError, match=r"later ran another head_f16.cu than .*run; one record"):
        write_record.make_record([folder, later])
    write_kernels(later, NOW)
    (later / "machine.json").write_text('{"name": "Another", "sm": 90}')
    with pytest.raises(ValueError, match=r"one record is of one device: \['A GPU', 'Another'\]"):
        write_record.make_record([folder, later])


def test_a_kernel_that_changed_came_or_went_is_a_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = load("write_record", monkeypatch).make_record([folder])
    later = NOW | {"head_f16": "another", "new_kernel": "a hash"}
    del later["rms_norm"]
    assert faults_of(record, later) == [
        "head_f16.cu or a header of it changed after the record was made",
        "new_kernel.cu is not in the record",
        "rms_norm.cu is gone",
    ]
    assert faults_of({"format_version": 0}, NOW) == ["the record has format 0, expected 1"]


def test_a_file_whose_process_hung_or_crashed_is_a_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It leaves no results, so that all that is told of it is its state.
    states = {
        "default-test_a": state(None, 240.0, "ended after 240 s"),
        "plain-test_b": state(-11),
        "plain-test_c": state(5),
        "sanitizer-memcheck-kernels": state(None, 0.0, "not there"),
        "sanitizer-racecheck-kernels": state(9, 5.0),
    }
    write_states(folder, states)
    record = load("write_record", monkeypatch).make_record([folder])
    assert faults_of(record, NOW) == [
        "compute-sanitizer found errors in racecheck-kernels",
        "default-test_a did not pass: ended after 240 s",
        "plain-test_b did not pass: exit code -11",
    ]


@pytest.mark.parametrize("count", [0, 2])
def test_a_program_that_ends_early_under_the_sanitizer_is_told_without_errors_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    write_states(folder, {"sanitizer-racecheck-kernels": state(9, 5.0)})
    (folder / "sanitizer-racecheck-kernels.out").write_text(
        "========= Error: process didn't terminate successfully\n"
        f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)\n"
    )
    record = load("write_record", monkeypatch).make_record([folder])
    faults = ["compute-sanitizer found errors in racecheck-kernels"] if count else []
    assert faults_of(record, NOW) == faults
    said = record["sanitizer"]["racecheck-kernels"]
    assert f"{count} hazards displayed" in said
    assert ("could not run to its end" in said) == (not count)


def step(
    steps: ModuleType, name: str, command: list[str], limit_s: float = 60, **facts: Any
) -> Any:
    return steps.Step(name, command, facts.pop("environment", {}), 0.1, limit_s, **facts)


def test_a_step_that_fails_or_hangs_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = load("steps", monkeypatch)
    python = sys.executable
    environment = {"A": "b"}
    listed = [
        step(
            steps,
            "good",
            [python, "-c", "import os; print(os.environ['A'])"],
            environment=environment,
        ),
        step(steps, "bad", [python, "-c", "raise SystemExit(3)"]),
        step(steps, "slow", [python, "-c", "import time; time.sleep(60)"], 0.3),
        step(steps, "missing", [str(tmp_path / "nothing")]),
    ]
    steps.Runner(tmp_path).run_all(listed, 2)
    states = steps.read_states(tmp_path)
    assert not any(found.is_cut_off for found in states.values())
    assert [states[one.name].exit_code for one in listed] == [0, 3, None, None]
    assert states["slow"].why == "ended after 0 s"
    assert "No such file" in states["missing"].why
    assert (tmp_path / "good.out").read_text() == "b\n"
    assert "bad: exit code 3" in capsys.readouterr().out


def test_a_step_that_there_is_no_time_for_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = load("steps", monkeypatch)
    runner = steps.Runner(tmp_path, time.monotonic() + 0.5)
    long = steps.Step("long", ["true"], {}, 60.0, 90.0)
    cut = step(steps, "cut", ["sleep", "60"], results=("old",))
    (tmp_path / "old").write_text("of an earlier run")
    runner.run_all([long, cut], 1)
    states = steps.read_states(tmp_path)
    assert list(states) == ["cut"]
    assert states["cut"].exit_code is None and states["cut"].is_cut_off
    assert states["cut"].seconds < 30
    assert not (tmp_path / "old").exists()
    assert "long: not started, 0 s left of 60 it needs" in capsys.readouterr().out


def test_a_runner_that_is_stopped_ends_what_runs_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = load("steps", monkeypatch)
    runner = steps.Runner(tmp_path)
    script = f"kill -TERM {os.getpid()}; sleep 60"
    before = signal.signal(signal.SIGTERM, lambda number, frame: runner.stop("SIGTERM"))
    try:
        listed = [step(steps, name, ["sh", "-c", script]) for name in ("first", "second")]
        runner.run_all(listed, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {name: found.why for name, found in steps.read_states(tmp_path).items()} == {
        "first": "cut off by SIGTERM"
    }


def test_a_step_that_hangs_takes_with_it_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = load("steps", monkeypatch)
    started = tmp_path / "pid"
    # As a benchmark: the process waits for another one.
    script = f"sleep 60 & echo $! >{started}; wait"
    steps.Runner(tmp_path).run_all([step(steps, "hung", ["sh", "-c", script], 1)], 1)
    assert steps.read_states(tmp_path)["hung"].why == "ended after 1 s"
    status = Path(f"/proc/{started.read_text().strip()}/stat")
    for _ in range(100):  # whoever adopts it reaps it
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the process that the step had started still runs")


def test_a_step_that_the_driver_does_not_let_go_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = load("steps", monkeypatch)
    monkeypatch.setattr(steps, "_kill", lambda group: None)
    monkeypatch.setattr(steps, "GONE_S", 0.1)
    listed = [
        step(steps, "held", ["sleep", "10"], 0.1),
        step(steps, "next", [sys.executable, "-S", "-c", "pass"]),
    ]
    steps.Runner(tmp_path).run_all(listed, 1)
    states = steps.read_states(tmp_path)
    assert states["held"].why == "ended after 0 s" and states["held"].seconds < 8
    assert states["next"].is_passed


@pytest.mark.parametrize(
    ("text", "outcome", "exit_code"),
    [
        ('import pytest\npytest.importorskip("no_such_module", reason="not here")\n', "skipped", 5),
        ("import no_such_module\n", "failed", 2),
    ],
)
def test_a_file_that_cannot_be_imported_is_told(
    tmp_path: Path, text: str, outcome: str, exit_code: int
) -> None:
    results = tmp_path / "results.json"
    done = run_file(tmp_path / "of", text, {"TURBOJET_GPU_RESULTS": str(results)})
    assert done.returncode == exit_code, done.stdout + done.stderr
    (told,) = map(json.loads, results.read_text().splitlines())
    assert (told["test"], told["outcome"]) == ("test_a.py", outcome)
    assert ("not here" in told["reason"]) == (outcome == "skipped")


def run_file(
    folder: Path, text: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a file of tests as one of tests/gpu, where no GPU is seen."""
    folder.mkdir()
    shutil.copy(GPU_TESTS / "conftest.py", folder)
    shutil.copy(GPU_TESTS.parent / "figures.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_a.py").write_text(text)
    usual = {key: value for key, value in os.environ.items() if "TURBOJET" not in key}
    usual |= {"PYTHONPATH": str(GPU_TESTS.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "test_a.py"]
    return subprocess.run(
        command, cwd=folder, env=usual | environment, capture_output=True, text=True, check=False
    )


def test_a_run_of_a_gpu_that_cannot_be_opened_fails_and_skips_nothing(tmp_path: Path) -> None:
    text = "def test_one() -> None:\n    pass\n"
    skipped = run_file(tmp_path / "gpu", text, {})
    assert skipped.returncode == 0 and "1 skipped" in skipped.stdout
    (tmp_path / "of").mkdir()
    results = {"TURBOJET_GPU_RESULTS": str(tmp_path / "results.jsonl")}
    failed = run_file(tmp_path / "of" / "gpu", text, results)
    assert failed.returncode == pytest.ExitCode.USAGE_ERROR, failed.stdout
    assert "the tests that need a GPU cannot run: " in failed.stderr


def test_what_a_run_cannot_do_is_said_before_it_begins(tmp_path: Path) -> None:
    def run(*arguments: str, **variables: str) -> tuple[int, str]:
        command = [sys.executable, str(GPU_TESTS / "run.py"), str(tmp_path / "run"), *arguments]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert not (tmp_path / "run" / "steps").exists()
        return done.returncode, done.stderr.strip().splitlines()[-1]

    code, said = run("--steps", "bench-*", "quantize-*")
    assert code == 2 and "no step is called quantize-* (those of quantization need" in said
    code, said = run(TURBOJET_EAGER="1")
    assert code == 2 and "TURBOJET_EAGER is set" in said
    code, said = run()
    assert code == DeviceError.exit_code and said.startswith("scripts/test-gpu: ")
