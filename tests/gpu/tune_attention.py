"""Measures variants of decode attention: decoding at several contexts, nodes; one table.

    python3 tests/gpu/tune_attention.py [--model llama-2-7b] [--only NAME...] [--output build/tune]

A variant is decode_attention.cu compiled with switches (decode_block.cuh, decode_stream.cuh), other
constants of the host (workspace.py, attention_shape.py), or both. The first one runs again at the
end: what it differs by is noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from tune_gemv import TunedUnit, line_of, start  # noqa: E402

from device_runtime.kernels.cubins import Cubin, read_record, write_record  # noqa: E402
from device_runtime.package_format import durable  # noqa: E402
from host_tools.kernels import Build, KernelCache, cached_unit  # noqa: E402

RUNS = (("1", "512", "1,8"), ("4032", "64", "1"), ("448", "64", "8"))
"""Tokens of the prompt, tokens after it, sequences at once."""
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
    Variant("next kernel at once", {"TRIGGER": 0}),
    Variant("next kernel after queries", {"TRIGGER": 2}),
    Variant("2 steps ahead in L2", {"AHEAD": 2}),
    Variant("4 steps ahead in L2", {"AHEAD": 4}),
    Variant("splits from 256 tokens", constants={_SPLIT_UNITS: 4}),
    Variant("splits from 512 tokens", constants={_SPLIT_UNITS: 8}),
    Variant("at most 2 splits", constants={_MAX_SPLITS: 2}),
    Variant("rings of 2 slots", constants={_MOST_SLOTS: 2}),
    Variant("rings of 3 slots", constants={_MOST_SLOTS: 3}),
    Variant("3 slots, 2 steps ahead", {"AHEAD": 2}, {_MOST_SLOTS: 3}),
)


def make_variant(
    base: Path, folder: Path, build: Build, switches: dict[str, int], cache: KernelCache
) -> Path:
    """Copy a folder of cubins and compile decode attention anew.

    Returns:
        ``folder``.
    """
    shutil.copytree(base, folder, dirs_exist_ok=True)
    rows: dict[str, Cubin] = {row.file: row for row in read_record(base)}
    flags = tuple(f"-DTURBOJET_DECODE_{name}={value}" for name, value in switches.items())
    unit = TunedUnit("decode_attention", build, 0, flags)
    cubin = cached_unit(unit, cache)
    durable.write_atomically(folder / unit.file, cubin)
    digest = hashlib.sha256(cubin).hexdigest()
    rows[unit.file] = replace(rows[unit.file], sha256=digest, flags=unit.flags)
    write_record(folder, rows.values())
    return folder


def measure(folder: Path, variant: Variant, model: str, repeats: int) -> list[dict[str, Any]]:
    """Return the facts of a benchmark for each of `RUNS`; an empty one where it failed."""
    environment = os.environ | {"TURBOJET_KERNELS": str(folder)}
    facts: list[dict[str, Any]] = []
    for prompt, completion, concurrency in RUNS:
        command = [sys.executable, "-c", _RUN, json.dumps(variant.constants), "bench"]
        command += ["--synthetic", model, "--prompt", prompt, "--completion", completion]
        command += ["--concurrency", concurrency, "--nodes", "--repeats", str(repeats), "--json"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        if done.returncode:
            sys.stderr.buffer.write(done.stderr[-2000:])
        facts.append({} if done.returncode else json.loads(done.stdout))
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, measure and print all variants."""
    variants = {variant.name: variant for variant in VARIANTS}
    tuning = start(__doc__.partition("\n")[0], list(variants), arguments)
    for index, name in enumerate(tuning.names):
        variant, folder = variants[name], tuning.output / f"attention-{index}"
        make_variant(tuning.base, folder, tuning.build, variant.switches, tuning.cache)
        facts = measure(folder, variant, tuning.model, tuning.repeats)
        path = tuning.output / f"attention-{index}.json"
        path.write_text(json.dumps({"variant": name, "runs": facts}, indent=1))
        for run, found in zip(RUNS, facts, strict=True):
            line = line_of({"slices": (), **found} if found else {})
            print(f"{name:26s} {'/'.join(run):12s} {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
