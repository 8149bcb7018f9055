"""Every family's packages on the GPU against the reference engine.

They are built here, or beforehand with tests/families.py into the folder TURBOJET_FAMILIES: then
nothing of the host half is needed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import figures
import numpy as np
import pytest

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams
from device_runtime.package_format import names
from device_runtime.package_format.package import open_package

VARIABLE = "TURBOJET_FAMILIES"
NUM_TOKENS = 40
"""Of a prompt: beyond the context that dynamic ropes were trained for, within every window."""

NUM_PROMPT = 9
"""Of them before the greedy tokens."""
GREEDY = GenerationParams(24, SamplingParams(temperature=0.0), ignore_eos=True)


def package_names() -> list[str]:
    """Every package that there is, or that can be built."""
    if VARIABLE in os.environ:
        found = Path(os.environ[VARIABLE]).glob(f"*/{names.MANIFEST}")
        return sorted(path.parent.name for path in found)
    if importlib.util.find_spec("transformers") is None:  # which makes the checkpoints
        return []
    try:
        from families import CASES
    except ImportError:
        return []
    return [f"{name}-{kind}" for name in CASES for kind in ("fp16", "w4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the packages are."""
    return Path(os.environ.get(VARIABLE) or tmp_path_factory.mktemp("families"))


def package(folder: Path, name: str) -> Path:
    """Return a package, built when it is not there."""
    if not (folder / name).is_dir():
        from families import build_packages

        build_packages(name.rpartition("-")[0], folder)
    return folder / name


@pytest.mark.parametrize("name", package_names())
def test_the_gpu_gives_the_references_logits_and_tokens(folder: Path, name: str) -> None:
    opened = open_package(package(folder, name))
    ids = np.random.default_rng(1).integers(3, 300, NUM_TOKENS).tolist()
    found: dict[str, tuple[np.ndarray, list[int]]] = {}
    same, after = 0, np.zeros(0)
    for backend in ("cuda", "reference"):
        # Few pages, not a share of what is free: others run on the device meanwhile.
        options = EngineOptions(
            backend=backend, quant_policy=0, session_len=NUM_TOKENS, cache_max_entry_count=8.0
        )
        with Engine.open(opened, options) as engine:
            outputs = list(engine.generate(ids[:NUM_PROMPT], GREEDY))
            tokens = [token for output in outputs for token in output.token_ids]
            found[backend] = (engine.logits(ids), tokens)
            pairs = enumerate(zip(found["cuda"][1], tokens, strict=True))
            same = next((place for place, (a, b) in pairs if a != b), len(tokens))
            if same < len(tokens):
                after = engine.logits(ids[:NUM_PROMPT] + tokens[:same])[-1]
            engine.check_integrity()
    (got, chosen), (want, known) = found["cuda"], found["reference"]
    norms = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    cosine = float(((want.astype(np.float64) * got).sum(1) / norms).min())
    figures.note("families: 1 - lowest cosine", 1 - cosine)
    figures.note("families: share of greedy tokens after another choice", 1 - same / len(known))
    assert cosine > 0.9999
    # Where two tokens are closer than rounding, either may win, and the answers part there.
    if same < len(known):
        assert after.max() - after[chosen[same]] < 0.05 * after.std()
