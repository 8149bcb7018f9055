import os
import signal
import subprocess
import sys
import time

import pytest

from host_tools.stage import exclusive
from host_tools.worker_processes import worker_processes

AT_WORK = """
import os, sys, time
from pathlib import Path
from host_tools.stage import exclusive
from host_tools.worker_processes import worker_processes

if __name__ == "__main__":
    with exclusive(Path(sys.argv[1])), worker_processes(2) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_run_elsewhere():
    with worker_processes(1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_ends_the_parent_ends_its_workers_and_frees_the_folder(tmp_path, number):
    (tmp_path / "at_work.py").write_text(AT_WORK)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "at_work.py", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    worker = int(process.stdout.readline())
    if number == signal.SIGINT:  # a terminal tells all of them
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(30)
    with exclusive(tmp_path):
        pass
    deadline = time.monotonic() + 30
    while is_alive(worker):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.01)
    assert "SpawnProcess" not in process.communicate()[1]  # no traceback but the parent's
