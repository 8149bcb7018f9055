"""Figures that the report's page shows and that no stage has noted as such."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from host_tools.layer_records import CLIP_STEPS, LinearRecord, QuantizeRecord
from host_tools.report.data import PackageFacts

Point = float | None

STEPS: tuple[tuple[str, str, Callable[[LinearRecord], Point]], ...] = (
    ("rounded to nearest", "c5", lambda linear: linear.rounded),
    ("scaled", "c2", lambda linear: linear.scaled),
    ("scaled, clipped", "c1", lambda linear: linear.clipped),
    ("compensated", "c3", lambda linear: linear.compensated),
)
"""What a linear goes through: name, colour, its error after it."""


def relative(error: Point, linear: LinearRecord) -> Point:
    """Return an error as a share of the linear's own output, None where either is unknown."""
    if error is None or linear.signal is None or linear.signal <= 0:
        return None
    return error / linear.signal


def layer_means(record: QuantizeRecord, step: Callable[[LinearRecord], Point]) -> list[Point]:
    """Return each layer's mean relative error after a step, over the linears that took it."""
    means: list[Point] = []
    for layer in record.layers:
        found = [relative(step(linear), linear) for linear in layer.linears]
        known = [value for value in found if value is not None]
        means.append(statistics.fmean(known) if known else None)
    return means


def median_gain(record: QuantizeRecord) -> Point:
    """Return by how much the search lowered the error of the median linear, 0.4 for 40 %."""
    gains = [
        1 - linear.final / linear.rounded
        for layer in record.layers
        for linear in layer.linears
        if linear.final is not None and linear.rounded
    ]
    return statistics.median(gains) if gains else None


def num_measured(record: QuantizeRecord) -> int:
    """Return the number of linears whose error is known."""
    return sum(linear.final is not None for layer in record.layers for linear in layer.linears)


def clip_shares(record: QuantizeRecord) -> list[float]:
    """Return the share of all groups at each kept share of their range, by `CLIP_STEPS`."""
    counts = [0] * (CLIP_STEPS + 1)
    for layer in record.layers:
        for linear in layer.linears:
            for place, count in enumerate(linear.clip_counts[: CLIP_STEPS + 1]):
                counts[place] += count
    total = sum(counts)
    return [count / total for count in counts] if total else []


def bits_per_weight(facts: PackageFacts) -> float:
    """Return what one weight of the decoder layers' linears takes, scales and zeros included."""
    return 8 * facts.linear_bytes / facts.num_linear_weights
