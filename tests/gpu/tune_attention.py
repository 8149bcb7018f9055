"""Measures variants of decode attention: decoding at several contexts, nodes; one table.

    python3 tests/gpu/tune_attention.py [--model llama-2-7b] [--only NAME...] [--runs RUN...]

A variant is decode_attention.cu compiled with switches (decode_switches.cuh), other
constants of the host (workspace.py, attention_shape.py), or both. The first one runs again at the
end: what it differs by is noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from tune_gemv import TunedUnit, facts_of, line_of, make_variant, start  # noqa: E402

from host_tools.kernels import Build  # noqa: E402

RUNS = ("1/512/1,8", "4092/64/1", "4096/64/1", "448/64/8")
"""Tokens of the prompt, tokens after it, sequences at once.

Up to 4096 tokens the warps of four splits have four steps each, of more one has a fifth.
"""
_RUN = """
import importlib, json, sys
for name, value in json.loads(sys.argv.pop(1)).items():
    module, _, constant = name.rpartition(".")
    loaded = importlib.import_module(module)
    if not hasattr(loaded, constant):
        sys.exit(f"{module} has no {constant}")
    setattr(loaded, constant, value)
from device_runtime.cli import main
sys.exit(main(sys.argv[1:]))
"""
_SPLIT_UNITS = "device_runtime.backends.cuda.workspace.SPLIT_UNITS"
_MAX_SPLITS = "device_runtime.backends.cuda.workspace.MAX_SPLITS"
_MOST_SLOTS = "device_runtime.kernels.attention_shape.MOST_SLOTS"


@dataclass(frozen=True)
class Variant:
    """Switches (TURBOJET_DECODE_...) of the kernel and constants of the host, by full name."""

    name: str
    switches: dict[str, int] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)


VARIANTS = (
    Variant("as built"),
    Variant("next kernel after copies", {"TRIGGER": 1}),
    Variant("next kernel after queries", {"TRIGGER": 2}),
    Variant("2 parts early", {"EARLY_PARTS": 2}),
    Variant("all parts early", {"EARLY_PARTS": 4}),
    Variant("splits from 256 tokens", constants={_SPLIT_UNITS: 4}),
    Variant("splits from 512 tokens", constants={_SPLIT_UNITS: 8}),
    Variant("at most 2 splits", constants={_MAX_SPLITS: 2}),
    Variant("rings of 2 slots", constants={_MOST_SLOTS: 2}),
    Variant("rings of 3 slots", constants={_MOST_SLOTS: 3}),
)


def units_of(build: Build, switches: dict[str, int]) -> list[TunedUnit]:
    """Return the source of a variant that differs."""
    flags = tuple(f"-DTURBOJET_DECODE_{name}={value}" for name, value in switches.items())
    return [TunedUnit("decode_attention", build, 0, flags)] if flags else []


def measure(
    folder: Path, variant: Variant, runs: Sequence[str], model: str, repeats: int
) -> list[dict[str, Any]]:
    """Return the facts of a benchmark for each of some `RUNS`; an empty one where it failed."""
    facts: list[dict[str, Any]] = []
    for run in runs:
        prompt, completion, concurrency = run.split("/")
        command = ["-c", _RUN, json.dumps(variant.constants), "bench", "--synthetic", model]
        command += ["--prompt", prompt, "--completion", completion, "--concurrency", concurrency]
        command += ["--nodes", "--repeats", str(repeats), "--json"]
        facts.append(facts_of(command, folder))
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, measure and print all variants."""
    variants = {variant.name: variant for variant in VARIANTS}
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    options, rest = parser.parse_known_args(arguments)
    tuning = start(__doc__.partition("\n")[0], list(variants), rest)
    for index, name in enumerate(tuning.names):
        variant, folder = variants[name], tuning.output / f"attention-{index}"
        make_variant(tuning.base, folder, units_of(tuning.build, variant.switches), tuning.cache)
        facts = measure(folder, variant, options.runs, tuning.model, tuning.repeats)
        path = tuning.output / f"attention-{index}.json"
        path.write_text(json.dumps({"variant": name, "runs": facts}, indent=1))
        for run, found in zip(options.runs, facts, strict=True):
            line = line_of({"slices": (), **found} if found else {})
            print(f"{name:26s} {run:12s} {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
