"""Variants of the GEMV for measuring: what is compiled, and how a measurement is told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from device_runtime.kernels.cubins import Cubin, read_record, write_record
from host_tools.kernels import Build, KernelCache, Unit, cached_unit

ROOT = Path(__file__).resolve().parents[2]
CACHE = KernelCache(ROOT / ".cache" / "nvrtc", ROOT / ".cache" / "cubins")
_spec = importlib.util.spec_from_file_location("tune_gemv", ROOT / "tests/gpu/tune_gemv.py")
assert _spec is not None and _spec.loader is not None
tune_gemv = importlib.util.module_from_spec(_spec)
sys.modules["tune_gemv"] = tune_gemv
_spec.loader.exec_module(tune_gemv)


@pytest.mark.skipif(
    not (CACHE.compilers / "13.0").is_dir(),
    reason="scripts/fetch-compilers gets the compilers; scripts/test runs it",
)
def test_a_variant_is_the_base_with_some_sources_compiled_anew(tmp_path: Path) -> None:
    build = Build(90, "13.0")
    unit = Unit("w4a16_gemv_1", build, 128)
    base = tmp_path / "base"
    base.mkdir()
    usual = cached_unit(unit, CACHE)
    (base / unit.file).write_bytes(usual)
    row = Cubin(unit.file, unit.source, 90, "13.0", 128, False, "", "", "", unit.flags)
    other = Cubin("other.cubin", "embedding", 90, "13.0", 0, False, "", "", "", ())
    (base / other.file).write_bytes(b"as it is")
    write_record(base, [row, other])
    switches = {1: {"READ_ONCE": 0, "GEMV_PARTS": 2}}
    units = tune_gemv.units_of(build, switches)
    folder = tune_gemv.make_variant(base, tmp_path / "made", units, CACHE)
    assert (folder / unit.file).read_bytes() != usual
    assert (folder / other.file).read_bytes() == b"as it is"
    made = {cubin.file: cubin for cubin in read_record(folder)}
    assert made[unit.file].flags[-2:] == ("-DTURBOJET_READ_ONCE=0", "-DTURBOJET_GEMV_PARTS=2")
    assert made[other.file] == other
    assert (base / unit.file).read_bytes() == usual


def test_every_switch_is_one_of_the_sources() -> None:
    text = "".join(
        path.read_text()
        for path in (ROOT / "device_runtime/kernels").glob("*.c*")
        if path.is_file()
    )
    for switches in tune_gemv.VARIANTS.values():
        for values in switches.values():
            for name in values:
                assert f"#ifndef TURBOJET_{name}\n" in text


def test_a_measurement_that_fails_or_hangs_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told = "import json, os; print(json.dumps({'kernels': os.environ['TURBOJET_KERNELS']}))"
    assert tune_gemv.facts_of(["-S", "-c", told], tmp_path) == {"kernels": str(tmp_path)}
    assert tune_gemv.facts_of(["-S", "-c", "raise SystemExit('on purpose')"], tmp_path) == {}
    monkeypatch.setattr(tune_gemv, "LIMIT_S", 0.5)
    assert tune_gemv.facts_of(["-S", "-c", "import time; time.sleep(60)"], tmp_path) == {}
    assert capfd.readouterr().err == "on purpose\nended after 0.5 s\n"


def test_a_measurement_is_a_line() -> None:
    facts = {
        "results": [{"decode_tok_s": 710.4}, {"decode_tok_s": 3600.0}],
        "nodes": [
            {"name": "wo", "seconds": 4.61e-6, "ratio": 1.32},
            {"name": "embed_f16", "seconds": 2e-6, "ratio": 0.0},
        ],
        "slices": [{"num_sms": 16, "num_tokens": 8, "weights_per_clock": 46.04}],
    }
    told = "710 3600 tok/s | wo 4.61(1.32) embed_f16 2.00 | 16x8:46.0"
    assert tune_gemv.line_of(facts) == told
    assert tune_gemv.line_of({}) == "failed"
