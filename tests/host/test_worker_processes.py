import os
import signal
import subprocess
import sys
import time

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


def test_a_kill_takes_the_workers_along_and_frees_the_folder(tmp_path):
    (tmp_path / "at_work.py").write_text(AT_WORK)
    command = [sys.executable, tmp_path / "at_work.py", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
    with exclusive(tmp_path):
        pass
    deadline = time.monotonic() + 30
    while is_alive(worker):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.01)
