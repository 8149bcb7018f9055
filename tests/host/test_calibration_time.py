import pytest
from test_plan import MODEL
from tiny_checkpoints import write_llama

from host_tools import calibration_time
from host_tools.calibration_time import cpu_notice, estimate_s, probe_flops_per_s
from host_tools.options import CalibrateOptions


def test_seconds_by_hand():
    # a layer: 1024 x (3 x 1024 qkv + 1024 o + 3 x 4096) = 16,777,216 weights; 16 layers, two
    # operations each, 2 x 1024 tokens, twice for the rest, at 1e9 a second
    options = CalibrateOptions(num_samples=2, seqlen=1024)
    assert estimate_s(MODEL, options, 1e9) == 2 * 16 * 16_777_216 * 2048 * 2 / 1e9


def test_the_probe_measures_something():
    assert probe_flops_per_s(MODEL) > 1e8


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_time, "probe_flops_per_s", lambda model: 1e6)
    return write_llama(tmp_path / "ckpt")


def test_the_default_is_stated_with_its_time_and_a_quicker_way(checkpoint, tmp_path):
    # 2 layers of 64 x (128 + 64 + 3 x 96) = 30,720 weights; 2 x 2 operations on 262,144 tokens at
    # 1e6 a second are 64,425 s; on 8192 tokens 2013 s
    notice = cpu_notice(checkpoint, tmp_path / "w", CalibrateOptions(device="cpu"))
    assert notice == (
        "calibrate: 128 x 2048 tokens of ptb on the CPU take about 17 h 53 min; "
        "--calib-samples 16 --calib-seqlen 512 would take 33 min 33 s"
    )


def test_a_quick_calibration_is_only_announced(checkpoint, tmp_path):
    options = CalibrateOptions("builtin", 16, 512, "cpu")
    notice = cpu_notice(checkpoint, tmp_path / "w", options)
    assert notice == "calibrate: 16 x 512 tokens of builtin on the CPU take about 33 min 33 s"


def test_a_finished_calibration_is_not_announced(checkpoint, tmp_path):
    options = CalibrateOptions("builtin", 16, 512, "cpu")
    calibration_time.calibrate_stage(checkpoint, tmp_path / "w", options).record([])
    assert cpu_notice(checkpoint, tmp_path / "w", options) is None
