"""The record of the last run of tests/gpu: what passed on which device with which kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "gpu" / "record.json"
FORMAT_VERSION = 1
VARIANTS = ("default", "plain")
SANITIZER_ERRORS = 9
"""What compute-sanitizer is told to exit with; any other failure means that it could not look."""
ENDED_EARLY = "the program could not run to its end under it"
"""What a record says where the tool ended the program and had found nothing until then."""
PLAN = "plan.json"
"""Names of all steps of a run, those included that were left."""
REFRESH = "run scripts/test-gpu on a machine with a GPU and commit tests/gpu/record.json"


def results_file(step: str) -> str:
    """Return the name of the file where a step's tests tell their outcomes."""
    return f"results-{step}.jsonl"


def read_record(path: Path = RECORD) -> dict[str, Any]:
    """Return a record."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def faults_of(record: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    """Return what speaks against a record, each a sentence; nothing when it holds.

    Args:
        record: as `read_record` returns it.
        sources: sha256 of each kernel source with its headers, as they are now.
    """
    if record.get("format_version") != FORMAT_VERSION:
        return [f"the record has format {record.get('format_version')}, expected {FORMAT_VERSION}"]
    recorded: Mapping[str, str] = record["sources"]
    faults = [
        f"{source}.cu or a header of it changed after the record was made"
        for source, digest in sorted(sources.items())
        if recorded.get(source) not in (None, digest)
    ]
    faults += [
        f"{source}.cu is not in the record" for source in sorted(set(sources) - set(recorded))
    ]
    faults += [f"{source}.cu is gone" for source in sorted(set(recorded) - set(sources))]
    for variant in VARIANTS:
        run = record["variants"].get(variant, {})
        if not run.get("num_passed"):
            faults.append(f"no test passed with the {variant} kernels")
        faults += [f"{test} failed with the {variant} kernels" for test in run.get("failed", ())]
        failed = record["selftest"].get(variant, {}).get("failed", ["the self test is missing"])
        faults += [f"self test with the {variant} kernels: {name}" for name in failed]
    said: Mapping[str, str] = record["sanitizer"]
    faults += [
        f"compute-sanitizer found errors in {name.removeprefix('sanitizer-')}"
        for name, state in sorted(record["steps"].items())
        if name.startswith("sanitizer-")
        and state["exit_code"] == SANITIZER_ERRORS
        and not said[name.removeprefix("sanitizer-")].startswith(ENDED_EARLY)
    ]
    # A process that hung or crashed left no results behind; 5 is pytest's for a file that is
    # skipped as a whole.
    faults += [
        f"{name} did not pass: {state['why'] or 'exit code ' + str(state['exit_code'])}"
        for name, state in sorted(record["steps"].items())
        if name.startswith(tuple(f"{variant}-" for variant in VARIANTS))
        and state["exit_code"] not in (0, 5)
    ]
    return faults
