"""What the savings of a package cost in perplexity: the record of it, and what a build says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from device_runtime.package_format import strict_json
from device_runtime.package_format.durable import write_atomically
from host_tools.perplexity_figures import shown

COSTS = "costs.json"
"""In the work folder."""
NOTABLE_INCREASE = 0.01
"""Above this a build warns."""
MAX_COSTS_BYTES = 1 << 20

STATIC_KV = "static int8 KV"
INT8_HEAD = "int8 head"
BOTH = f"{STATIC_KV} and {INT8_HEAD}"


@dataclass(frozen=True)
class Cost:
    """One saving and what it does.

    Attributes:
        name: "static int8 KV", "int8 head" or both.
        perplexity: with it.
        increase: relative; 0.01 is one percent worse.
    """

    name: str
    perplexity: float
    increase: float


@dataclass(frozen=True)
class CostReport:
    """What was measured.

    Attributes:
        dataset: the text.
        num_samples: windows of it.
        seqlen: tokens of a window.
        perplexity: with keys, values and head in floating point.
        costs: of each saving that the package makes.
    """

    dataset: str
    num_samples: int
    seqlen: int
    perplexity: float
    costs: tuple[Cost, ...]


def write_costs(work_dir: Path, report: CostReport) -> Path:
    """Write what was measured, whole or not at all, and return the file."""
    path = work_dir / COSTS
    write_atomically(path, json.dumps(strict_json.encode(report), indent=1).encode("ascii"))
    return path


def read_costs(work_dir: Path) -> CostReport | None:
    """Read what :func:`write_costs` wrote, None when it is not there.

    Raises:
        PackageError: the file is damaged.
    """
    path = work_dir / COSTS
    if not path.is_file():
        return None
    value = strict_json.parse_object(path.read_bytes(), path.name, MAX_COSTS_BYTES)
    return strict_json.decode(CostReport, value, path.name)


def forget_costs(work_dir: Path) -> None:
    """Drop what was measured of a package that saved: the one that is built now does not."""
    (work_dir / COSTS).unlink(missing_ok=True)


def cost_sentences(report: CostReport) -> tuple[str, ...]:
    """Return a sentence for each cost, a warning where it is above `NOTABLE_INCREASE`."""
    text = f"{report.num_samples} windows of {report.seqlen} tokens of the {report.dataset} text"
    remedies = {STATIC_KV: "--quant-policy 8 costs less", INT8_HEAD: "--head fp16 costs nothing"}
    sentences = []
    for cost in report.costs:
        figures = f"{shown(report.perplexity, '.3f')} -> {shown(cost.perplexity, '.3f')} on {text}"
        sentence = f"{cost.name} costs {shown(100 * cost.increase, '.2f')} % perplexity ({figures})"
        if cost.increase > NOTABLE_INCREASE:
            remedy = remedies.get(cost.name, "see each alone")
            sentence = f"warning: {sentence}, more than 1 %; {remedy}"
        sentences.append(sentence)
    return tuple(sentences)
