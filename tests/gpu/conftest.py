"""What every test here needs: a GPU, and cubins for it in the folder TURBOJET_KERNELS.

Where TURBOJET_GPU_RESULTS names a file, the outcome of each test and the figures that it noted go
there as a line of JSON when it ends, and its name when it starts, for tests/gpu/write_record.py.
Such a run is of a GPU: where it cannot be opened nothing is skipped, the run fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator

import figures
import pytest

from device_runtime.errors import DeviceError

RESULTS_VARIABLE = "TURBOJET_GPU_RESULTS"
REASON_CHARACTERS = 400


def _write(row: dict[str, object]) -> None:
    """Add a line, which stays whatever becomes of this process."""
    path = os.environ.get(RESULTS_VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _missing() -> str:
    from device_runtime.backends.cuda.driver import open_driver

    try:
        open_driver().close()
    except DeviceError as error:
        return str(error)
    if not os.environ.get("TURBOJET_KERNELS"):
        return "TURBOJET_KERNELS names no folder of cubins, scripts/build-kernels makes one"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items = [item for item in items if "/gpu/" in str(item.path)]
    reason = _missing() if items else ""
    if reason and RESULTS_VARIABLE in os.environ:
        raise pytest.UsageError(f"the tests that need a GPU cannot run: {reason}")
    if reason:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"runs on a machine with a GPU: {reason}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    figures.take()
    yield
    item.user_properties += list(figures.take().items())


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"test": nodeid, "outcome": "started"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A test that passed or failed reports its call; one that was skipped or broke, its setup; one
    # that left something broken, its teardown.
    if report.when == "call" or report.outcome != "passed":
        _write_outcome(report, dict(report.user_properties))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    # A file that cannot be imported, or that is skipped as a whole, has no tests that could tell.
    if report.outcome != "passed":
        _write_outcome(report, {})


def _write_outcome(
    report: pytest.TestReport | pytest.CollectReport, noted: dict[str, object]
) -> None:
    told = report.longrepr
    crash = getattr(told, "reprcrash", None)
    reason = told[2] if isinstance(told, tuple) else crash.message if crash else str(told or "")
    row = {"test": report.nodeid, "outcome": report.outcome, "reason": reason[:REASON_CHARACTERS]}
    _write({**row, "figures": noted})
