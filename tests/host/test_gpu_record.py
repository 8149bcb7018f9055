"""The record of tests/gpu holds for the kernels as they are; what it says comes from a run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gpu_record import RECORD, REFRESH, faults_of, read_record

from device_runtime.kernels.cubins import SOURCES, Cubin, write_record
from host_tools.kernels import sources_sha256

GPU_TESTS = RECORD.parent
NOW = {source: sources_sha256(source) for source in SOURCES}


@pytest.mark.skipif(not RECORD.is_file(), reason=f"tests/gpu has no record yet: {REFRESH}")
def test_the_record_is_of_these_kernels_and_everything_passed() -> None:
    faults = faults_of(read_record(), NOW)
    assert not faults, f"{'; '.join(faults)}: {REFRESH}"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GPU_TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def row(test: str, outcome: str = "passed", **figures: float) -> dict[str, Any]:
    return {
        "test": f"tests/gpu/test_a.py::{test}",
        "outcome": outcome,
        "reason": "",
        "figures": figures,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves behind."""
    states = {
        "sanitizer-memcheck-kernels": {"exit_code": 0, "seconds": 9.0, "why": ""},
        "sanitizer-racecheck-kernels": {
            "exit_code": None,
            "seconds": 1.0,
            "why": "ended after 1 s",
        },
        "default-test_a": {"exit_code": 0, "seconds": 2.0, "why": ""},
    }
    (tmp_path / "steps.json").write_text(json.dumps(states))
    (tmp_path / "machine.json").write_text(json.dumps({"name": "A GPU", "sm": 90}))
    (tmp_path / "sanitizer-memcheck-kernels.out").write_text(
        "hm\n========= ERROR SUMMARY: 0 errors\n"
    )
    for variant in ("default", "plain"):
        rows = [row("test_one[1]", error=1e-4), row("test_one[2]", error=3e-4), row("test_two")]
        (tmp_path / f"results-{variant}-test_a.json").write_text(json.dumps(rows))
        checks = [{"name": "rms_norm_f16", "is_passed": True}]
        (tmp_path / f"selftest-{variant}.out").write_text(
            json.dumps({"device": "A GPU", "seconds": 2.0, "checks": checks})
        )
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    write_record(
        kernels,
        [
            Cubin(f"{source}.cubin", source, 90, "13.0", 0, False, "", NOW[source], ())
            for source in SOURCES
        ],
    )
    names = "prompt_tokens completion_tokens concurrency rounds read_bytes_s ttft_s ttft_min_s"
    names += " ttft_max_s token_time_p50_s token_time_p99_s decode_tok_s decode_tok_s_min"
    names += " decode_tok_s_max share_of_read_bandwidth bytes_per_step"
    result = dict.fromkeys(names.split(), 1)
    bench = {"model": "m", "machine": {}, "memory": {}, "results": [result], "load": None}
    bench |= {"nodes": [{"name": "qkv"}], "slices": [], "projections": []}
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.json").write_text(json.dumps(bench))
    (tmp_path / "bench" / "failed.json").write_text("")
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "a.json").write_text('{"seconds": 3}')
    return tmp_path


def test_a_record_says_what_passed_on_what(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = load("write_record", monkeypatch).make_record(folder)
    assert record["machine"] == {"name": "A GPU", "sm": 90}
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
    (folder / "results-plain-test_a.json").unlink()
    rows = [row("test_one[1]", "failed"), row("test_two", "skipped"), row("test_three")]
    (folder / "results-default-test_a.json").write_text(json.dumps(rows))
    record = load("write_record", monkeypatch).make_record(folder)
    assert record["variants"]["default"]["num_skipped"] == 1
    assert faults_of(record, NOW) == [
        "tests/gpu/test_a.py::test_one[1] failed with the default kernels",
        "no test passed with the plain kernels",
        "self test with the plain kernels: it did not run to its end",
    ]


def test_a_kernel_that_changed_came_or_went_is_a_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = load("write_record", monkeypatch).make_record(folder)
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
        "default-test_a": {"exit_code": None, "seconds": 240.0, "why": "ended after 240 s"},
        "plain-test_b": {"exit_code": -11, "seconds": 2.0, "why": ""},
        "plain-test_c": {"exit_code": 5, "seconds": 2.0, "why": ""},
        "sanitizer-memcheck-kernels": {"exit_code": None, "seconds": 0.0, "why": "not there"},
        "sanitizer-racecheck-kernels": {"exit_code": 9, "seconds": 5.0, "why": ""},
    }
    (folder / "steps.json").write_text(json.dumps(states))
    record = load("write_record", monkeypatch).make_record(folder)
    assert faults_of(record, NOW) == [
        "compute-sanitizer found errors in racecheck-kernels",
        "default-test_a did not pass: ended after 240 s",
        "plain-test_b did not pass: exit code -11",
    ]


def test_a_step_that_fails_or_hangs_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load("run", monkeypatch)
    python = sys.executable
    steps = [
        run.Step("good", [python, "-c", "import os; print(os.environ['A'])"], {"A": "b"}, 60),
        run.Step("bad", [python, "-c", "raise SystemExit(3)"], {}, 60),
        run.Step("slow", [python, "-c", "import time; time.sleep(60)"], {}, 0.3),
        run.Step("missing", [str(tmp_path / "nothing")], {}, 60),
    ]
    states = run.run_steps(steps, tmp_path, 2)
    assert [states[name].exit_code for name in ("good", "bad", "slow", "missing")] == [
        *(0, 3),
        *(None, None),
    ]
    assert states["slow"].why == "ended after 0 s"
    assert "No such file" in states["missing"].why
    assert (tmp_path / "good.out").read_text() == "b\n"
    assert "bad: exit code 3" in capsys.readouterr().out
    names = [step.name for step in run.correctness_steps(tmp_path, ["default", "plain"])]
    assert "sanitizer-racecheck-engine" in names and "plain-test_w4a16_gemv" in names
    assert not any("real_model" in name for name in names)


def test_a_step_that_hangs_takes_with_it_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load("run", monkeypatch)
    started = tmp_path / "pid"
    # As scripts/bench: the shell waits for a process of its own.
    script = f"sleep 60 & echo $! >{started}; wait"
    state = run.run_step(run.Step("hung", ["sh", "-c", script], {}, 1), tmp_path)
    assert state.why == "ended after 1 s"
    status = Path(f"/proc/{started.read_text().strip()}/stat")
    for _ in range(100):  # whoever adopts it reaps it
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the process that the step had started still runs")


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
    shutil.copy(GPU_TESTS / "conftest.py", tmp_path)
    shutil.copy(GPU_TESTS.parent / "figures.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_a.py").write_text(text)
    results = tmp_path / "results.json"
    environment = os.environ | {
        "TURBOJET_GPU_RESULTS": str(results),
        "PYTHONPATH": str(GPU_TESTS.parents[1]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_a.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    (told,) = json.loads(results.read_text())
    assert (told["test"], told["outcome"]) == ("test_a.py", outcome)
    assert ("not here" in told["reason"]) == (outcome == "skipped")
