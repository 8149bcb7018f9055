"""Figures of a model's predictions: finite however ruined it is, and how they are shown."""

from __future__ import annotations

import math

MAX_FIGURE = 1e300
"""Stands for whatever is beyond it or no number at all: JSON has neither infinity nor NaN."""

MAX_FIXED = 1e6
"""From here on a figure is shown with an exponent."""


def capped(figure: float) -> float:
    """Return a figure, :data:`MAX_FIGURE` where it is beyond that or no number."""
    return figure if abs(figure) < MAX_FIGURE else MAX_FIGURE


def perplexity_of(loss: float, num_predictions: int) -> float:
    """Return e to the mean negative log-likelihood, at most :data:`MAX_FIGURE`.

    Args:
        loss: sum of the negative log-likelihoods, in nats.
        num_predictions: tokens that it is of.
    """
    mean = loss / num_predictions
    return math.exp(mean) if mean < math.log(MAX_FIGURE) else MAX_FIGURE


def shown(figure: float, form: str) -> str:
    """Return a figure in a form like ``.3f`` or ``+.2f``, with an exponent where it is long."""
    sign = "+" if form.startswith("+") else ""
    return format(figure, form if abs(figure) < MAX_FIXED else f"{sign}.3g")
