"""Every family, from its published layout to both engines, against the model it was made for.

The CUDA engine runs on the emulator of tests/emulator; tests/gpu/test_families.py runs it on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import families
import numpy as np
import pytest
from emulator import emulator

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams
from device_runtime.package_format.package import open_package
from device_runtime.templates.choose import choose_template
from host_tools.checkpoint.families import FAMILIES

sys.path.append(str(Path(__file__).parents[1] / "unit"))  # the fake and the emulated driver

NUM_GREEDY = 12
GREEDY = GenerationParams(NUM_GREEDY, SamplingParams(temperature=0.0), ignore_eos=True)
SHORT = 14
"""Tokens that the emulator takes; more where a family's rope changes beyond its context."""


@dataclass(frozen=True)
class Result:
    """Of one package: lowest cosine of any position, greedy tokens that agree."""

    cosine: float
    cuda_cosine: float
    num_equal: int

    def __str__(self) -> str:
        return f"{self.cosine:.7f} | {self.num_equal}/{NUM_GREEDY} | {self.cuda_cosine:.7f}"


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows of the table, printed at the end (pytest -s)."""
    rows: list[str] = []
    yield rows
    print("\n| family | files | fp16 cosine | tokens | CUDA | W4 cosine | tokens | CUDA |")
    print("|---" * 8 + "|")
    print("\n".join(rows))


def prompt(count: int) -> list[int]:
    return np.random.default_rng(1).integers(3, 300, count).tolist()


def lowest_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found.astype(np.float64) * expected).sum(1) / norms).min())


def cuda_cosine(
    root: Path, reference: families.Reference, count: int, monkeypatch: pytest.MonkeyPatch
) -> float:
    """Return the lowest cosine of the emulated CUDA engine's logits, nan without a compiler."""
    if not emulator.has_compiler():
        return float("nan")
    from emulated_cuda import EmulatedCuda
    from fake_cuda import install, write_cubins

    group_size = open_package(root).model.group_size or 128
    kernels = write_cubins(root.with_name(f"{root.name}-kernels"), group_size=group_size)
    monkeypatch.setenv("TURBOJET_KERNELS", str(kernels))
    install(monkeypatch, EmulatedCuda(group_size=group_size))
    options = EngineOptions(backend="cuda", quant_policy=0, session_len=48)
    with Engine.open(root, options) as engine:
        return lowest_cosine(engine.logits(prompt(count)), reference.logits(prompt(count)))


def compared(
    root: Path, case: families.FamilyCase, state: dict, monkeypatch: pytest.MonkeyPatch
) -> Result:
    """Run a package on both engines and compare it with the published model."""
    reference = families.Reference(case, state)
    ids = prompt(case.num_tokens)
    options = EngineOptions(backend="reference", quant_policy=0, session_len=case.num_tokens)
    with Engine.open(root, options) as engine:
        cosine = lowest_cosine(engine.logits(ids), reference.logits(ids))
        outputs = list(engine.generate(ids[:9], GREEDY))
        model = engine.package.model
    tokens = [token for output in outputs for token in output.token_ids]
    pairs = zip(tokens, reference.greedy(ids[:9], NUM_GREEDY), strict=True)
    # Once is enough for the angles, which have nothing to do with the weights' type.
    is_stretched = model.rope_scaling.kind in ("dynamic", "qwen1") and not model.group_size
    count = 34 if is_stretched else SHORT
    cuda = cuda_cosine(root, reference, count, monkeypatch)
    return Result(cosine, cuda, sum(ours == theirs for ours, theirs in pairs))


@pytest.mark.parametrize("name", families.CASES)
def test_packages_give_the_logits_of_the_published_model(
    tmp_path: Path, name: str, table: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = families.CASES[name]
    built = families.build_packages(name, tmp_path)
    fp16 = compared(built.fp16, case, families.random_state(case), monkeypatch)
    w4 = compared(built.w4, case, families.dequantized_state(built.awq), monkeypatch)
    template = choose_template(built.checkpoint, name)
    assert open_package(built.w4).manifest.template == template
    files = sorted(path.name for path in built.checkpoint.iterdir() if path.suffix != ".json")
    table.append(f"| {name} | {', '.join(files)} | {fp16} | {w4} |")
    for result in (fp16, w4):
        assert result.cosine > 0.9999
        assert not result.cuda_cosine <= 0.9999  # nan where nothing can compile the kernels
        assert result.num_equal == NUM_GREEDY


def test_every_table_has_a_case() -> None:
    tested = {case.config["architectures"][0] for case in families.CASES.values()}
    assert all(tested & set(family.architectures) for family in FAMILIES)
