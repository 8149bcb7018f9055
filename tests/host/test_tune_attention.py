"""The variants that tests/gpu/tune_attention.py measures: what they switch is there."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from host_tools.kernels import Build

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "device_runtime" / "kernels"


@pytest.fixture
def tune_attention(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    return importlib.import_module("tune_attention")


def test_every_switch_and_constant_is_there(tune_attention) -> None:
    sources = "".join(path.read_text() for path in KERNELS.glob("decode_*.cuh"))
    assert not tune_attention.VARIANTS[0].switches and not tune_attention.VARIANTS[0].constants
    for variant in tune_attention.VARIANTS:
        for switch in variant.switches:
            assert f"#ifndef TURBOJET_DECODE_{switch}\n" in sources
        units = tune_attention.units_of(Build(90, "13.0"), variant.switches)
        assert sum(len(unit.switches) for unit in units) == len(variant.switches)
        for name in variant.constants:
            module, _, constant = name.rpartition(".")
            assert isinstance(getattr(importlib.import_module(module), constant), int)


def test_a_constant_that_is_not_there_ends_the_run(tune_attention) -> None:
    def run(constants: dict[str, int]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", tune_attention._RUN, json.dumps(constants), "--help"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    wrong = run({"device_runtime.backends.cuda.workspace.NOTHING": 1})
    assert wrong.returncode == 1
    assert "workspace has no NOTHING" in wrong.stderr
    right = run({tune_attention._SPLIT_UNITS: 4})
    assert right.returncode == 0
    assert "bench" in right.stdout
