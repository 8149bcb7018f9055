"""Measures the models and lengths that README.md and DECISIONS.md speak of, on random weights.

    scripts/bench [FOLDER] [--only NAME...]    JSON of every run goes to FOLDER (build/bench)

Each run is a process of its own, so that one that fails costs only its own figures. At the end, and
with --table alone, the figures of FOLDER are told beside what they must and should be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from bench_table import read_folder, table_lines  # noqa: E402

from device_runtime.apps.bench_nodes import node_lines, slice_lines  # noqa: E402
from device_runtime.apps.bench_runs import Workload  # noqa: E402
from device_runtime.backends.cuda.nodes import NodeTime  # noqa: E402
from device_runtime.backends.cuda.slices import SliceRate  # noqa: E402


@dataclass(frozen=True)
class Run:
    """One call of ``turbojet bench``.

    Attributes:
        name: of the file that it makes.
        arguments: of the call.
        expected_s: seconds on an H200.
    """

    name: str
    arguments: tuple[str, ...]
    expected_s: float


def _run(name: str, model: str, arguments: str, expected_s: float) -> Run:
    return Run(name, ("--synthetic", model, *arguments.split()), expected_s)


_DECODE = "--prompt 1 --completion 512"
RUNS = (
    _run("llama-2-7b-decode", "llama-2-7b", f"{_DECODE} --concurrency 1,8", 30),
    _run("llama-2-7b-first-token", "llama-2-7b", "--prompt 128,512,2048 --completion 16", 20),
    # Up to three decode steps are under way when nodes are measured: 4096 tokens at most.
    _run("llama-2-7b-nodes", "llama-2-7b", "--prompt 4092 --completion 64 --nodes", 25),
    _run(
        "llama-2-7b-slices",
        "llama-2-7b",
        "--prompt 1 --completion 64 --project orin-nano-8gb,orin-nx-16gb,agx-orin-64gb,thor",
        20,
    ),
    _run("internlm2-1.8b-decode", "internlm2-1.8b", f"{_DECODE} --concurrency 1,8", 25),
    _run("internlm2-1.8b-int8-head", "internlm2-1.8b", f"{_DECODE} --head int8", 15),
    _run("internlm2-7b-decode", "internlm2-7b", f"{_DECODE} --concurrency 1,8", 35),
    _run("internlm2-7b-int8-head", "internlm2-7b", f"{_DECODE} --head int8", 25),
    _run("llama-2-7b-load", "llama-2-7b", "--prompt 1 --completion 16 --load", 60),
    _run(
        "llama-2-7b-nodes-8",
        "llama-2-7b",
        "--prompt 128 --completion 64 --concurrency 8 --nodes",
        20,
    ),
    _run("llama-2-7b-nodes-4128", "llama-2-7b", "--prompt 4128 --completion 64 --nodes", 25),
    _run("llama-2-7b-int8-head", "llama-2-7b", f"{_DECODE} --head int8", 20),
)
"""What the table needs comes first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return 1 where a run failed."""
    options = build_parser().parse_args(arguments)
    failed = []
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        wanted = [run for run in RUNS if not options.only or run.name in options.only]
        failed = [run.name for run in wanted if not measure(run, options.folder, options.repeats)]
    if not options.no_table:
        print("\n".join(table_lines(read_folder(options.folder))))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "bench")
    names = [run.name for run in RUNS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    repeats = os.environ.get("REPEATS", "5")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds that count (5)")
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--table", action="store_true", help="measure nothing, tell FOLDER's table")
    table.add_argument("--no-table", action="store_true", help="only what was measured")
    return parser


def measure(run: Run, folder: Path, repeats: int) -> bool:
    """Make one run, tell it and keep it as JSON; return whether it succeeded."""
    command = [sys.executable, "-m", "device_runtime.cli", "bench", *run.arguments]
    print(f"== {run.name}: turbojet bench {' '.join(run.arguments)}", file=sys.stderr, flush=True)
    path = folder / f"{run.name}.json"
    path.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, "--repeats", str(repeats), "--json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        return False
    path.write_bytes(done.stdout)
    print("\n".join(lines_of(json.loads(done.stdout))), flush=True)
    return True


def lines_of(facts: dict[str, Any]) -> list[str]:
    """Return what a run found, for a person."""
    lines = [
        f"{facts['model']}: {row['prompt_tokens']} + {row['completion_tokens']} tokens x "
        f"{row['concurrency']}: TTFT {1e3 * row['ttft_s']:.1f} ms, "
        f"decode {row['decode_tok_s']:.1f} "
        f"({row['decode_tok_s_min']:.1f} - {row['decode_tok_s_max']:.1f}) tok/s, "
        f"{row['read_bytes_s'] / 1e9:.0f} GB/s, {row['share_of_read_bandwidth']:.0%} of reading"
        for row in facts["results"]
    ]
    if facts["load"]:
        load = facts["load"]
        lines.append(
            f"  load of {load['weight_bytes'] / 1e9:.2f} GB: {load['load_s']:.2f} s "
            f"({load['load_s_min']:.2f} - {load['load_s_max']:.2f})"
        )
    first = facts["results"][0]
    workload = Workload(*(first[key] for key in Workload.__dataclass_fields__))
    nodes = [
        NodeTime(**{key: node[key] for key in NodeTime.__dataclass_fields__})
        for node in facts["nodes"]
    ]
    lines += node_lines(nodes, workload)
    lines += slice_lines([SliceRate(**rate) for rate in facts["slices"]])
    lines += [
        f"  projected, {board['board']}: {board['decode_tok_s']:.1f} tok/s"
        for board in facts["projections"]
    ]
    rest = ", ".join(f"{key[:-6]} {value / 1e6:.0f} MB" for key, value in facts["memory"].items())
    return [*lines, f"  {facts['machine']['device']}, {facts['backend']}; {rest}"]


if __name__ == "__main__":
    sys.exit(main())
