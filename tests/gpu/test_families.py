"""Every family's packages on the GPU against the reference engine.

They are built here, or beforehand with tests/families.py into the folder TURBOJET_FAMILIES.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams

VARIABLE = "TURBOJET_FAMILIES"
families = pytest.importorskip("families", reason="tests/families.py needs torch and safetensors")
GREEDY = GenerationParams(24, SamplingParams(temperature=0.0), ignore_eos=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the packages, each called NAME-KIND."""
    return Path(os.environ.get(VARIABLE) or tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("kind", ["fp16", "w4"])
@pytest.mark.parametrize("name", families.CASES)
def test_the_gpu_gives_the_references_logits_and_tokens(
    packages: Path, name: str, kind: str
) -> None:
    root = packages / f"{name}-{kind}"
    if not root.is_dir():
        families.build_packages(name, packages)
    case = families.CASES[name]
    ids = np.random.default_rng(1).integers(3, 300, case.num_tokens).tolist()
    found = {}
    for backend in ("reference", "cuda"):
        options = EngineOptions(backend=backend, quant_policy=0, session_len=case.num_tokens)
        with Engine.open(root, options) as engine:
            outputs = list(engine.generate(ids[:9], GREEDY))
            tokens = [token for output in outputs for token in output.token_ids]
            found[backend] = (engine.logits(ids), tokens)
            engine.check_integrity()
    (want, chosen), (got, tokens) = found["reference"], found["cuda"]
    norms = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    cosine = float(((want.astype(np.float64) * got).sum(1) / norms).min())
    same = sum(a == b for a, b in zip(tokens, chosen, strict=True))
    print(f"{name} {kind}: cosine {cosine:.7f}, {same} of {len(chosen)} greedy tokens")
    assert cosine > 0.9999
    assert same == len(chosen)
