"""How long a package takes to load, its files in the page cache as after an installation."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device_runtime.backends.memory_plan import plan_memory
from device_runtime.backends.select import create_backend
from device_runtime.backends.synthetic import SyntheticPackage
from device_runtime.engine.configure import cache_request
from device_runtime.engine.options import EngineOptions
from device_runtime.package_format.package import Package

_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class LoadResult:
    """Seconds from an open package to a backend that is ready, context and kernels included.

    Attributes:
        weight_bytes: of the files.
        load_s: median over rounds.
        load_s_min: fastest round.
        load_s_max: slowest round.
    """

    weight_bytes: int
    load_s: float
    load_s_min: float
    load_s_max: float


def measure_load(package: Package, options: EngineOptions, repeats: int) -> LoadResult:
    """Load a package several times; a synthetic one is written to a temporary folder first.

    Raises:
        TurbojetError: as `Engine.open`.
    """
    times = []
    with _on_disk(package) as stored:
        for _ in range(repeats):
            _read_all(stored)
            times.append(_load_once(stored, options))
    return LoadResult(package.weight_bytes, statistics.median(times), min(times), max(times))


def _load_once(package: Package, options: EngineOptions) -> float:
    start = time.perf_counter()
    backend = create_backend(options.backend, package)
    try:
        request = cache_request(package, options)
        survey = backend.survey(package, request, options.memory_limit_bytes)
        backend.load(package, plan_memory(package.model, request, survey))
        return time.perf_counter() - start
    finally:
        backend.close()


@contextmanager
def _on_disk(package: Package) -> Iterator[Package]:
    if not isinstance(package, SyntheticPackage):
        yield package
        return
    with tempfile.TemporaryDirectory(prefix="turbojet-bench-") as folder:
        root = Path(folder)
        (root / package.specs[0].path).parent.mkdir(parents=True)
        for spec in package.specs:
            package.tensor(spec.name).tofile(root / spec.path)
        yield Package(root, None, package.config, package.model, package.specs)


def _read_all(package: Package) -> None:
    """Read every weight file, so that the page cache holds what memory allows."""
    for spec in package.specs:
        with open(package.root / spec.path, "rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass
