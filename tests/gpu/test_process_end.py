"""A process that fails while the GPU works ends with the right code, one sentence and no abort."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_package import make_package, tiny_model

from device_runtime.backends.cuda.driver import open_driver
from device_runtime.errors import DeviceError

TESTS = Path(__file__).resolve().parents[1]
START = """
import os, signal, sys
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams
engine = Engine.open(sys.argv[1], EngineOptions(backend="cuda"))
engine.add(list(range(3, 40)), GenerationParams(max_tokens=200, ignore_eos=True))
for _ in range(5):
    engine.step()
"""
FAULT = """
from device_runtime.backends.cuda.kernel_set import KernelSet, find_cubins, kernel_folders
from device_runtime.errors import DeviceError
import pathlib
driver = engine._backend.driver
files = find_cubins(kernel_folders(pathlib.Path("none")), ("rms_norm",), 0, driver)
kernels, stream = KernelSet(driver, files), driver.new_stream()
kernels.launch("rms_norm_f16", (1, 1, 1), (64, 64, 64, 64, 1e-5)).enqueue(stream)
try:
    stream.synchronize()
    for _ in range(50):
        engine.step()
except DeviceError as error:
    print(f"turbojet: {error}", file=sys.stderr)
    engine.close()
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "head_dim": 64, "group_size": 32}
    folder = tmp_path_factory.mktemp("package") / "tiny"
    return make_package(folder, tiny_model(**sizes), quant_policy=8, max_batch_size=2).root


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    # pycuda aborts at exit when a context is left on its stack.
    for word in ("abort", "terminate", "core dumped", "PyCUDA"):
        assert word not in done.stderr, done.stderr
    return done


def test_an_exception_in_the_middle_of_a_generation_ends_like_any_other(root: Path) -> None:
    done = run("-c", START + "raise ValueError('on purpose')", str(root))
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ValueError: on purpose")


def test_leaving_in_the_middle_of_a_generation_leaves_with_the_code(root: Path) -> None:
    done = run("-c", START + "sys.exit(7)", str(root))
    assert (done.returncode, done.stderr) == (7, "")


def test_an_interrupt_is_an_interrupt(root: Path) -> None:
    done = run("-c", START + "os.kill(os.getpid(), signal.SIGINT)\nengine.step()", str(root))
    assert done.returncode == -2
    assert "KeyboardInterrupt" in done.stderr


def test_a_kernel_that_faults_is_a_device_error(root: Path) -> None:
    done = run("-c", START + FAULT, str(root))
    assert done.returncode == DeviceError.exit_code, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("turbojet: cu") and "start again" in line


def test_a_gpu_without_memory_is_a_device_error() -> None:
    with open_driver() as driver:
        free, _ = driver.memory_info()
        address = driver.allocate(free - (2 << 30))  # a context fits, the weights do not
        try:
            command = ("-m", "device_runtime.cli", "bench", "--backend", "cuda")
            done = run(*command, "--synthetic", "llama-2-7b")
        finally:
            driver.free(address)
    assert done.returncode == DeviceError.exit_code, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "MiB" in line
