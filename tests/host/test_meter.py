import time

import numpy as np

from host_tools import meter
from host_tools.meter import Meter, anonymous_bytes


def test_the_peak_holds_what_was_allocated_and_freed_again():
    before = anonymous_bytes()
    with Meter() as measured:
        block = np.ones(16 << 20)  # 128 MiB, touched
        time.sleep(0.2)  # ten looks of the sampler
        del block
    assert measured.peak_anon_bytes - before > 120 << 20
    assert measured.seconds_s > 0
    assert anonymous_bytes() < measured.peak_anon_bytes


def test_without_proc_the_peak_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(meter, "STATUS", tmp_path / "status")
    assert anonymous_bytes() == 0
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert anonymous_bytes() == 0
