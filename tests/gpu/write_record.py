"""Writes tests/gpu/record.json from the files that tests/gpu/run.py left in a folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu_record import FORMAT_VERSION, RECORD, VARIANTS  # noqa: E402

from device_runtime.kernels.cubins import SOURCES, read_record  # noqa: E402

_CASE = re.compile(r"\[.*\]$")
_SANITIZER_ERRORS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
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


def variant_facts(folder: Path, variant: str) -> dict[str, Any]:
    """Return what passed with one variant of the kernels, by file and test, and its figures."""
    rows = []
    for path in sorted(folder.glob(f"results-{variant}-*.json")):
        rows += json.loads(path.read_text(encoding="utf-8"))
    figures: dict[str, float] = {}
    for row in rows:
        for name, value in row["figures"].items():
            figures[name] = max(value, figures.get(name, value))
    passed = Counter(_CASE.sub("", row["test"]) for row in rows if row["outcome"] == "passed")
    tests: dict[str, dict[str, int]] = {}
    for test, count in sorted(passed.items()):
        file, _, name = test.partition("::")
        tests.setdefault(file, {})[name] = count
    skipped = [row for row in rows if row["outcome"] == "skipped"]
    return {
        "num_passed": passed.total(),
        "failed": sorted(row["test"] for row in rows if row["outcome"] == "failed"),
        "num_skipped": len(skipped),
        "skipped_because": sorted({row["reason"] for row in skipped}),
        "tests": tests,
        "figures": dict(sorted(figures.items())),
    }


def selftest_facts(folder: Path, variant: str) -> dict[str, Any]:
    """Return what the self test said of one variant."""
    path = folder / f"selftest-{variant}.out"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"failed": ["it did not run to its end"]}
    checks = facts["checks"]
    return {
        "num_passed": sum(check["is_passed"] for check in checks),
        "failed": [check["name"] for check in checks if not check["is_passed"]],
        "seconds": facts["seconds"],
    }


def sanitizer_facts(folder: Path, states: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the last word of each compute-sanitizer run, or why there is none."""
    facts = {}
    for name, state in sorted(states.items()):
        if not name.startswith("sanitizer-"):
            continue
        text = ""
        for suffix in ("out", "err"):
            path = folder / f"{name}.{suffix}"
            text += path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        summaries = _SANITIZER_ERRORS.findall(text)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        facts[name.removeprefix("sanitizer-")] = (
            f"{summaries[-1]} (exit code {state['exit_code']})"
            if summaries
            else f"no result: {state['why'] or (lines or ['it said nothing'])[-1]}"
        )
    return facts


def bench_facts(folder: Path) -> dict[str, Any]:
    """Return the figures of each benchmark, without what derives from them."""
    facts = {}
    for path in sorted(folder.glob("bench/*.json")):
        try:
            bench = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # it failed; its log says why
        facts[path.stem] = {
            "model": bench["model"],
            "machine": bench["machine"],
            "memory": bench["memory"],
            "results": [{key: row[key] for key in _KEPT_RESULTS} for row in bench["results"]],
            **{key: bench[key] for key in ("load", "nodes", "slices", "projections") if bench[key]},
        }
    return facts


def quantize_facts(folder: Path) -> dict[str, Any]:
    """Return what scripts/measure-quantize wrote, by file."""
    paths = sorted(folder.glob("quantize/*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def make_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run."""
    states = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    cubins = read_record(folder / "kernels")
    return {
        "format_version": FORMAT_VERSION,
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "machine": json.loads((folder / "machine.json").read_text(encoding="utf-8")),
        "compilers": sorted({f"NVRTC {cubin.cuda}, sm_{cubin.sm}" for cubin in cubins}),
        "sources": {
            source: next(c.sources_sha256 for c in cubins if c.source == source)
            for source in SOURCES
        },
        "variants": {variant: variant_facts(folder, variant) for variant in VARIANTS},
        "selftest": {variant: selftest_facts(folder, variant) for variant in VARIANTS},
        "sanitizer": sanitizer_facts(folder, states),
        "bench": bench_facts(folder),
        "quantize": quantize_facts(folder),
        "steps": states,
    }


def commit() -> str:
    """Return the commit that ran; a marker where files differ from it, "" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def main() -> int:
    """Write the record of the folder that the command line names."""
    folder = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else RECORD
    record = make_record(folder)
    target.write_text(json.dumps(record, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    for variant in VARIANTS:
        facts = record["variants"][variant]
        print(
            f"{variant}: {facts['num_passed']} passed, {len(facts['failed'])} failed, "
            f"{facts['num_skipped']} skipped"
        )
        for test in facts["failed"]:
            print(f"  FAILED {test}")
    for tool, result in record["sanitizer"].items():
        print(f"{tool}: {result}")
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
