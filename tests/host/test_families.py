"""Every family, from its published layout to the engine, against the model it was published for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import families
import numpy as np
import pytest

from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.engine.engine import Engine, EngineOptions, GenerationParams
from host_tools.checkpoint.families import FAMILIES

NUM_GREEDY = 12
GREEDY = GenerationParams(NUM_GREEDY, SamplingParams(temperature=0.0), ignore_eos=True)


@dataclass(frozen=True)
class Row:
    """One line of the table: lowest cosine of any position, greedy tokens that agree."""

    name: str
    layout: str
    cosines: tuple[float, float]
    num_equal: tuple[int, int]

    def __str__(self) -> str:
        figures = " | ".join(
            f"{cosine:.7f} | {equal}/{NUM_GREEDY}"
            for cosine, equal in zip(self.cosines, self.num_equal, strict=True)
        )
        return f"| {self.name} | {self.layout} | {figures} |"


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    """Rows of the table, printed at the end (pytest -s)."""
    rows: list[Row] = []
    yield rows
    print("\n| family | files | fp16 cosine | tokens | W4 cosine | tokens |")
    print("|---" * 6 + "|")
    print("\n".join(map(str, rows)))


def compared(root: Path, case: families.FamilyCase, state: dict) -> tuple[float, int]:
    """Return the lowest cosine of the logits, and how many greedy tokens agree."""
    reference = families.Reference(case, state)
    ids = np.random.default_rng(1).integers(3, 300, case.num_tokens).tolist()
    options = EngineOptions(backend="reference", quant_policy=0, session_len=case.num_tokens)
    with Engine.open(root, options) as engine:
        found, expected = engine.logits(ids), reference.logits(ids)
        outputs = list(engine.generate(ids[:9], GREEDY))
    tokens = [token for output in outputs for token in output.token_ids]
    same = sum(a == b for a, b in zip(tokens, reference.greedy(ids[:9], NUM_GREEDY), strict=True))
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found.astype(np.float64) * expected).sum(1) / norms).min()), same


@pytest.mark.parametrize("name", families.CASES)
def test_packages_give_the_logits_of_the_published_model(
    tmp_path: Path, name: str, table: list[Row]
) -> None:
    case = families.CASES[name]
    built = families.build_packages(name, tmp_path)
    results = (
        compared(built.fp16, case, families.random_state(case)),
        compared(built.w4, case, families.dequantized_state(built.awq)),
    )
    files = sorted(path.name for path in built.checkpoint.iterdir() if path.suffix != ".json")
    row = Row(name, ", ".join(files), *zip(*results, strict=True))
    table.append(row)
    assert min(row.cosines) > 0.9999
    assert row.num_equal == (NUM_GREEDY, NUM_GREEDY)


def test_every_table_has_a_case() -> None:
    tested = {case.config["architectures"][0] for case in families.CASES.values()}
    assert all(tested & set(family.architectures) for family in FAMILIES)
