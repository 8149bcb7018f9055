"""`scripts/test-gpu` on the CPU emulator: steps of each kind, a record, and going on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import emulator
from gpu_record import faults_of, read_record

from device_runtime.kernels.cubins import SOURCES
from host_tools.kernels import sources_sha256

ROOT = Path(__file__).resolve().parents[2]
CORRECT = ["default-test_cuda_backend", "default-test_w4a16_gemv", "plain-test_head"]
MEASURED = ["bench-llama-2-7b-nodes", "bench-llama-2-7b-slices"]

pytestmark = pytest.mark.skipif(
    not emulator.has_compiler(), reason="the kernels run on the CPU where there is g++"
)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/test-gpu; of a plan that is not done to its end the exit code is 1."""
    environment = {key: value for key, value in os.environ.items() if "TURBOJET" not in key}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "scripts" / "test-gpu"), "--emulated", str(folder), "--jobs", "1"]
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = run(folder, "--steps", *CORRECT, *MEASURED)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "left for a run with --continue: sanitizer-memcheck-kernels" in done.stdout
    return folder


def test_steps_that_ran_pass_and_the_others_are_told(folder: Path) -> None:
    record = read_record(folder / "record.json")
    ran = {name: facts for name, facts in record["steps"].items() if facts["seconds"]}
    assert sorted(ran) == sorted([*CORRECT, *MEASURED])
    logs = {name: (folder / f"{name}.out").read_text()[-2000:] for name in ran}
    assert {facts["exit_code"] for facts in ran.values()} == {0}, logs
    faults = faults_of(record, {source: sources_sha256(source) for source in SOURCES})
    assert all("was not run" in fault or "self test" in fault for fault in faults)
    assert "plain-test_w4a16_gemv did not pass: it was not run" in faults


def test_the_record_has_tests_figures_and_benchmarks(folder: Path) -> None:
    record = read_record(folder / "record.json")
    assert record["machine"]["name"] == "Fake GPU"
    default = record["variants"]["default"]
    assert default["num_passed"] == 2 and default["failed"] == {}
    assert 0 < default["figures"]["worst relative error, W4A16 GEMV"] < 5e-4
    nodes = [node["name"] for node in record["bench"]["llama-2-7b-nodes"]["nodes"]]
    assert nodes == ["qkv", "attention", "wo", "gate+up", "down", "layer"]
    slices = record["bench"]["llama-2-7b-slices"]["slices"]
    assert [part["num_sms"] for part in slices] == [8, 8, 8, 14, 14, 14, 16, 16, 16]


def test_a_run_that_goes_on_leaves_out_what_has_passed(folder: Path) -> None:
    gone = folder / "steps" / "plain-test_head.json"
    gone.unlink()
    done = run(folder, "--continue", "--steps", *CORRECT)
    assert "plain-test_head: exit code 0" in done.stdout
    assert "w4a16_gemv: exit" not in done.stdout and "cuda_backend: exit" not in done.stdout
    assert json.loads(gone.read_text())["exit_code"] == 0
