"""Measures variants of the GEMV: the step's nodes, slices of the device, decoding; one table.

    python3 tests/gpu/tune_gemv.py [--model llama-2-7b] [--only NAME...] [--output build/tune]

Each variant is a set of kernels in which the sources of some widths were compiled with switches
(w4a16_ring.cuh, ptx.cuh). The first one runs again at the end: what it differs by is noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from device_runtime.kernels.cubins import Cubin, read_record, write_record  # noqa: E402
from device_runtime.package_format import durable  # noqa: E402
from host_tools.kernel_sets import build_kernels  # noqa: E402
from host_tools.kernels import Build, KernelCache, Unit, cached_unit  # noqa: E402
from host_tools.progress import Progress  # noqa: E402

GROUP_SIZE = 128
LIMIT_S = 180.0
"""Seconds that one measurement may take."""
_POLICY, _PARTS, _EARLY = "READ_ONCE", "GEMV_PARTS", "GEMV_EARLY_PARTS"
_SINGLE = "GEMV_SINGLE_EARLY"
VARIANTS: dict[str, dict[int, dict[str, int]]] = {
    "as built": {},
    "weights stay in L2": {1: {_POLICY: 0}},
    "all weights leave L2 first": {4: {_POLICY: 1}, 8: {_POLICY: 1}},
    "one token in halves": {1: {_PARTS: 2}},
    "and half a unit early": {1: {_PARTS: 2, _EARLY: 1}},
    "several tokens in halves": {4: {_PARTS: 2}, 8: {_PARTS: 2}},
    "a single unit whole early": {1: {_SINGLE: 2}},
    "a single unit late": {1: {_SINGLE: 0}},
}
"""Switches (TURBOJET_...) of the sources by their width."""


@dataclass(frozen=True)
class TunedUnit(Unit):
    """A cubin that is compiled with switches."""

    switches: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's flags."""
        return (*super().flags, *self.switches)


def units_of(build: Build, switches: dict[int, dict[str, int]]) -> list[TunedUnit]:
    """Return the sources of a variant of the GEMV that differ, by the switches of each width."""
    flags = {
        width: tuple(f"-DTURBOJET_{name}={value}" for name, value in values.items())
        for width, values in switches.items()
    }
    return [TunedUnit(f"w4a16_gemv_{width}", build, GROUP_SIZE, flags[width]) for width in flags]


def make_variant(base: Path, folder: Path, units: Sequence[TunedUnit], cache: KernelCache) -> Path:
    """Copy a folder of cubins and compile some of its sources anew.

    Returns:
        ``folder``.
    """
    shutil.copytree(base, folder, dirs_exist_ok=True)
    rows: dict[str, Cubin] = {row.file: row for row in read_record(base)}
    for unit in units:
        cubin = cached_unit(unit, cache)
        durable.write_atomically(folder / unit.file, cubin)
        digest = hashlib.sha256(cubin).hexdigest()
        rows[unit.file] = replace(rows[unit.file], sha256=digest, flags=unit.flags)
    write_record(folder, rows.values())
    return folder


def facts_of(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the facts that a benchmark tells as JSON with a folder of kernels.

    Nothing where it failed or hung, which is said.
    """
    environment = os.environ | {"TURBOJET_KERNELS": str(folder)}
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=LIMIT_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        sys.stderr.buffer.write(error.stderr[-2000:])
        return {}
    except subprocess.TimeoutExpired:
        print(f"ended after {LIMIT_S:.1f} s", file=sys.stderr)
        return {}
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def measure(folder: Path, model: str, repeats: int) -> dict[str, Any]:
    """Return the facts of a benchmark with a folder of kernels."""
    command = ["-m", "device_runtime.cli", "bench", "--synthetic", model]
    command += ["--prompt", "1", "--completion", "512", "--concurrency", "1,8", "--nodes"]
    command += ["--project", "agx-orin-64gb", "--repeats", str(repeats), "--json"]
    return facts_of(command, folder)


def line_of(facts: dict[str, Any]) -> str:
    """Return what a variant reached: tok/s, us of nodes (times of reading), weights per clock."""
    if not facts:
        return "failed"
    decode = " ".join(f"{row['decode_tok_s']:.0f}" for row in facts["results"])
    nodes = " ".join(
        f"{node['name']} {1e6 * node['seconds']:.2f}"
        + (f"({node['ratio']:.2f})" if node["ratio"] else "")
        for node in facts["nodes"]
    )
    slices = " ".join(
        f"{part['num_sms']}x{part['num_tokens']}:{part['weights_per_clock']:.1f}"
        for part in facts["slices"]
    )
    return f"{decode} tok/s | {nodes} | {slices}"


@dataclass(frozen=True)
class Tuning:
    """What every variant starts from.

    Attributes:
        model: whose shapes are measured.
        repeats: rounds that count.
        output: folder of kernels and figures.
        names: of the variants, in their order; the first one again at the end.
        build: for this device.
        cache: of compiled kernels.
        base: folder of the kernels as they are.
    """

    model: str
    repeats: int
    output: Path
    names: tuple[str, ...]
    build: Build
    cache: KernelCache
    base: Path


def start(title: str, names: Sequence[str], arguments: Sequence[str] | None) -> Tuning:
    """Read the command line and compile the kernels as they are."""
    from device_runtime.backends.cuda.driver import open_driver

    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--model", default="llama-2-7b", help="shapes of the random weights")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "tune")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help="'" + "', '".join(names) + "'"
    )
    options = parser.parse_args(arguments)
    with open_driver() as driver:
        build = Build(driver.sm, "13.0")
    os.environ.setdefault("TURBOJET_CACHE_DIR", str(ROOT / ".cache"))
    cache = KernelCache.default()
    options.output.mkdir(parents=True, exist_ok=True)
    base = build_kernels(options.output / "kernels", [build], cache, Progress())
    wanted = [name for name in names[1:] if not options.only or name in options.only]
    chosen = (names[0], *wanted, names[0])
    return Tuning(options.model, options.repeats, options.output, chosen, build, cache, base)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, measure and print all variants."""
    tuning = start(__doc__.partition("\n")[0], list(VARIANTS), arguments)
    for index, name in enumerate(tuning.names):
        folder = tuning.output / f"kernels-{index}"
        make_variant(tuning.base, folder, units_of(tuning.build, VARIANTS[name]), tuning.cache)
        facts = measure(folder, tuning.model, tuning.repeats)
        (tuning.output / f"{index}.json").write_text(
            json.dumps({"variant": name, **facts}, indent=1)
        )
        print(f"{name:28s} {line_of(facts)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
