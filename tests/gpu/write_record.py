"""Writes tests/gpu/record.json from the files that tests/gpu/run.py left in one or more folders.

    python3 tests/gpu/write_record.py FOLDER... [--record FILE]

Of a step that several folders have, the last one counts; they must have run the same kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

from bench_table import read_folder, table_lines  # noqa: E402
from gpu_record import (  # noqa: E402
    ENDED_EARLY,
    FORMAT_VERSION,
    PLAN,
    RECORD,
    VARIANTS,
    faults_of,
    results_file,
)
from steps import State, read_states  # noqa: E402

from device_runtime.kernels.cubins import SOURCES, Cubin, read_record  # noqa: E402
from host_tools.kernels import sources_sha256  # noqa: E402

NOT_RUN = State(None, 0.0, "it was not run")
Places = Mapping[str, Path]
"""The folder that counts for each step that ran."""
_CASE = re.compile(r"\[.*\]$")
_SANITIZER_ERRORS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
_NO_ERRORS = re.compile(r"\b0 errors")
_BROKEN_OFF = "process didn't terminate successfully"
_KEPT_RESULTS = (
    "prompt_tokens",
    "completion_tokens",
    "concurrency",
    "rounds",
    "ttft_s",
    "ttft_min_s",
    "ttft_max_s",
    "decode_tok_s",
    "decode_tok_s_min",
    "decode_tok_s_max",
    "token_time_p50_s",
    "token_time_p99_s",
    "read_bytes_s",
    "share_of_read_bandwidth",
)


def variant_facts(places: Places, variant: str) -> dict[str, Any]:
    """Return what passed with one variant of the kernels, by file and test, and its figures."""
    rows: dict[str, dict[str, Any]] = {}
    figures: dict[str, float] = {}
    for step, folder in sorted(places.items()):
        if not step.startswith(f"{variant}-"):
            continue
        for row in read_lines(folder / results_file(step)):
            rows[row["test"]] = row
            for name, value in row.get("figures", {}).items():
                figures[name] = max(value, figures.get(name, value))
    passed = Counter(_CASE.sub("", test) for test in rows if rows[test]["outcome"] == "passed")
    tests: dict[str, dict[str, int]] = {}
    for test, count in sorted(passed.items()):
        file, _, name = test.partition("::")
        tests.setdefault(file, {})[name] = count
    skipped = [row for row in rows.values() if row["outcome"] == "skipped"]
    failed = {
        test: row.get("reason", "it did not end")
        for test, row in sorted(rows.items())
        if row["outcome"] not in ("passed", "skipped")
    }
    return {
        "num_passed": passed.total(),
        "failed": failed,
        "num_skipped": len(skipped),
        "skipped_because": sorted({row["reason"] for row in skipped}),
        "tests": tests,
        "figures": dict(sorted(figures.items())),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of JSON of a file; nothing where there is none."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the last one, when its process was ended
    return rows


def selftest_facts(places: Places, variant: str) -> dict[str, Any]:
    """Return what the self test said of one variant."""
    step = f"selftest-{variant}"
    try:
        facts = json.loads((places[step] / f"{step}.out").read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError):
        return {"failed": ["it did not run to its end"]}
    checks = facts["checks"]
    return {
        "num_passed": sum(check["is_passed"] for check in checks),
        "failed": [check["name"] for check in checks if not check["is_passed"]],
        "seconds": facts["seconds"],
    }


def sanitizer_facts(places: Places, states: Mapping[str, State]) -> dict[str, str]:
    """Return the last word of each compute-sanitizer run, or why there is none."""
    facts = {}
    for name, folder in sorted(places.items()):
        if not name.startswith("sanitizer-"):
            continue
        text = ""
        for suffix in ("out", "err"):
            path = folder / f"{name}.{suffix}"
            text += path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        summaries = _SANITIZER_ERRORS.findall(text)
        if summaries and _BROKEN_OFF in text and _NO_ERRORS.search(summaries[-1]):
            facts[name.removeprefix("sanitizer-")] = f"{ENDED_EARLY}; {summaries[-1]}"
            continue
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        facts[name.removeprefix("sanitizer-")] = (
            f"{summaries[-1]} (exit code {states[name].exit_code})"
            if summaries
            else f"no result: {states[name].why or (lines or ['it said nothing'])[-1]}"
        )
    return facts


def bench_facts(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the figures of each benchmark, without what derives from them."""
    facts = {}
    for name, bench in json_files(folders, "bench").items():
        facts[name] = {
            "model": bench["model"],
            "machine": bench["machine"],
            "memory": bench["memory"],
            "results": [{key: row[key] for key in _KEPT_RESULTS} for row in bench["results"]],
            **{key: bench[key] for key in ("load", "nodes", "slices", "projections") if bench[key]},
        }
    return facts


def json_files(folders: Sequence[Path], name: str) -> dict[str, Any]:
    """Return what the JSON files of a folder in each folder hold; the last one of a name counts."""
    found: dict[str, Any] = {}
    for folder in folders:
        found |= read_folder(folder / name)
    return found


def make_record(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the record of the runs that left these folders, in their order.

    Raises:
        ValueError: they ran on other devices or with other kernels.
    """
    states: dict[str, State] = {}
    places: dict[str, Path] = {}
    plan: dict[str, None] = {}
    for folder in folders:
        plan |= dict.fromkeys(json.loads((folder / PLAN).read_text(encoding="utf-8")))
        found = read_states(folder)
        states |= found
        places |= dict.fromkeys(found, folder)
    machines = [
        json.loads((folder / "machine.json").read_text(encoding="utf-8")) for folder in folders
    ]
    commits = list(dict.fromkeys(machine.pop("commit", "") or commit() for machine in machines))
    if len({(machine["name"], machine["sm"]) for machine in machines}) > 1:
        raise ValueError(
            f"one record is of one device: {[machine['name'] for machine in machines]}"
        )
    cubins = kernels_of(folders)
    return {
        "format_version": FORMAT_VERSION,
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": ", ".join(commits),
        "machine": machines[-1],
        "compilers": sorted({f"NVRTC {cubin.cuda}, sm_{cubin.sm}" for cubin in cubins}),
        "sources": {cubin.source: cubin.sources_sha256 for cubin in cubins},
        "variants": {variant: variant_facts(places, variant) for variant in VARIANTS},
        "selftest": {variant: selftest_facts(places, variant) for variant in VARIANTS},
        "sanitizer": sanitizer_facts(places, states),
        "bench": bench_facts(folders),
        "quantize": json_files(folders, "quantize"),
        "steps": {name: asdict(states.get(name, NOT_RUN)) for name in plan | states},
    }


def kernels_of(folders: Sequence[Path]) -> tuple[Cubin, ...]:
    """Return the cubins that all folders ran.

    Raises:
        ValueError: they differ.
    """
    cubins = [read_record(folder / "kernels") for folder in folders]
    for folder, other in zip(folders, cubins, strict=True):
        ran = {cubin.source: cubin.sources_sha256 for cubin in other}
        first = {cubin.source: cubin.sources_sha256 for cubin in cubins[0]}
        changed = sorted(source for source in ran | first if ran.get(source) != first.get(source))
        if changed:
            raise ValueError(
                f"{folder} ran another {changed[0]}.cu than {folders[0]}; one record is of one set "
                "of kernels"
            )
    return cubins[0]


def commit() -> str:
    """Return the commit that ran; a marker where files differ from it, "" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def write(folders: Sequence[Path], target: Path) -> None:
    """Write the record of some folders and tell what is in it and what speaks against it."""
    record = make_record(folders)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for variant in VARIANTS:
        facts = record["variants"][variant]
        print(
            f"{variant}: {facts['num_passed']} passed, {len(facts['failed'])} failed, "
            f"{facts['num_skipped']} skipped"
        )
        for test, reason in facts["failed"].items():
            print(f"  FAILED {test}: {reason}")
    for tool, result in record["sanitizer"].items():
        print(f"{tool}: {result}")
    if record["bench"]:
        print("\n".join(table_lines(record["bench"])))
    for fault in faults_of(record, {source: sources_sha256(source) for source in SOURCES}):
        if not fault.endswith(NOT_RUN.why):
            print(f"speaks against the record: {fault}")
    print(f"wrote {target}")


def main() -> int:
    """Write the record of the folders that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="+", type=Path)
    parser.add_argument("--record", type=Path, default=RECORD, help="where it goes")
    args = parser.parse_args()
    try:
        write(args.folder, args.record)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
