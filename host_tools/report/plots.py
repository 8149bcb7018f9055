"""Plots as inline SVG: no script, no fonts, colours by class so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from host_tools.markup import Markup, element

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 30
MAX_X_LABELS = 16

Point = float | None


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        name: for the legend.
        colour: class of the colour, ``c1`` to ``c4``.
        values: one per place on the horizontal axis; None leaves a gap.
    """

    name: str
    colour: str
    values: tuple[Point, ...]


@dataclass(frozen=True)
class Scale:
    """Maps values to heights or widths in pixels.

    Attributes:
        low: value at ``start``.
        high: value at ``end``.
        start: pixel.
        end: pixel.
        is_log: whether equal steps are equal factors.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value, kept inside."""
        low, high, x = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, x = math.log(low), math.log(high), math.log(x)
        return self.start + (self.end - self.start) * (x - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return round values from low to high: 1, 2 and 5 times powers of ten."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            step = round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            found = [index * step for index in range(first, first + 12)]
        slack = 1e-9 * abs(self.high - self.low)
        return [value for value in found if self.low - slack <= value <= self.high + slack]


def round_step(least: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def line_plot(series: Sequence[Series], label: Callable[[float], str], what: str) -> Markup:
    """Return lines over layers on a logarithmic scale.

    Args:
        series: of equal length.
        label: words of a value.
        what: read out in place of the picture.
    """
    height = 260
    values = [v for line in series for v in line.values if v is not None and v > 0]
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    scale = Scale(low / 1.25, high * 1.25, height - BOTTOM, TOP, is_log=True)
    count = max(len(line.values) for line in series)
    across = Scale(0, max(1, count - 1), LEFT + 10, WIDTH - RIGHT - 10)
    parts = [*_grid(scale, label), *_layer_labels(across, count, height)]
    for line in series:
        places = [
            (across.at(index), scale.at(value), value, index)
            for index, value in enumerate(line.values)
            if value is not None and value > 0
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        parts.append(element("polyline", points=points, class_=f"line {line.colour}"))
        for x, y, value, index in places:
            title = element("title", f"layer {index}, {line.name}: {label(value)}")
            parts.append(element("circle", title, cx=x, cy=y, r=2.4, class_=f"dot {line.colour}"))
    return _svg(height, what, parts)


def heat_plot(
    names: Sequence[str],
    rows: Sequence[Sequence[Point]],
    titles: Sequence[Sequence[str]],
    what: str,
) -> Markup:
    """Return a field per linear and layer, the darker the larger its value; None is hatched.

    Args:
        names: of the rows.
        rows: one value per layer, above 0.
        titles: what is shown when one points at a field.
        what: read out in place of the picture.
    """
    cell_height, height = 20, TOP + 20 * len(rows) + BOTTOM
    count = max(len(row) for row in rows)
    width = (WIDTH - RIGHT - LEFT) / max(1, count)
    values = sorted(value for row in rows for value in row if value)
    # A few linears that are nearly free of error must not make all others look alike.
    low, high = (values[len(values) // 20], values[-1]) if values else (1.0, 1.0)
    shade = Scale(math.log(low), math.log(high) + 1e-9, 0.06, 1.0)
    parts = []
    for row, name in enumerate(names):
        y = TOP + row * cell_height
        parts.append(element("text", name, x=LEFT - 8, y=y + 14, class_="tick end"))
        for column, value in enumerate(rows[row]):
            is_there = value is not None and value > 0
            opacity = shade.at(math.log(value)) if value and is_there else None
            parts.append(
                element(
                    "rect",
                    element("title", titles[row][column]),
                    x=LEFT + column * width,
                    y=y,
                    width=max(1.0, width - 1.0),
                    height=cell_height - 1,
                    class_="heat" if is_there else "absent",
                    fill_opacity=opacity,
                )
            )
    across = Scale(0, max(1, count - 1), LEFT + width / 2, WIDTH - RIGHT - width / 2)
    parts += _layer_labels(across, count, height)
    return _svg(height, what, parts)


def bar_plot(shares: Sequence[float], labels: Sequence[str], what: str) -> Markup:
    """Return bars of shares of a whole, each 0 to 1, with a word below each."""
    height = 200
    scale = Scale(0.0, max(max(shares), 0.01) * 1.1, height - BOTTOM, TOP)
    width = (WIDTH - LEFT - RIGHT) / len(shares)
    step = -(-len(shares) // MAX_X_LABELS)
    parts = _grid(scale, lambda value: f"{100 * value:.3g} %")
    for index, (share, label) in enumerate(zip(shares, labels, strict=True)):
        x, y = LEFT + index * width, scale.at(share)
        title = element("title", f"{label}: {100 * share:.2f} %")
        parts.append(
            element(
                "rect",
                title,
                x=x + 1,
                y=y,
                width=max(1.0, width - 2.0),
                height=scale.start - y,
                class_="bar c1",
            )
        )
        if index % step == 0:
            middle = x + width / 2
            parts.append(
                element("text", label, x=middle, y=height - BOTTOM + 16, class_="tick middle")
            )
    return _svg(height, what, parts)


def range_plot(lows: Sequence[float], highs: Sequence[float], colour: str, what: str) -> Markup:
    """Return a bar from the least to the greatest value of each layer."""
    height = 190
    least, most = min(*lows, 0.0), max(*highs, 0.0)
    margin = 0.05 * (most - least) or 1.0
    scale = Scale(least - margin, most + margin, height - BOTTOM, TOP)
    across = Scale(0, max(1, len(lows) - 1), LEFT + 12, WIDTH - RIGHT - 12)
    width = min(14.0, 0.6 * (WIDTH - LEFT - RIGHT) / len(lows))
    parts = [*_grid(scale, lambda value: f"{value:.3g}"), *_layer_labels(across, len(lows), height)]
    for index, (low, high) in enumerate(zip(lows, highs, strict=True)):
        top = scale.at(high)
        parts.append(
            element(
                "rect",
                element("title", f"layer {index}: {low:.4g} to {high:.4g}"),
                x=across.at(index) - width / 2,
                y=top,
                width=width,
                height=max(1.0, scale.at(low) - top),
                rx=2,
                class_=f"bar {colour}",
            )
        )
    return _svg(height, what, parts)


@dataclass(frozen=True)
class Segment:
    """One piece of a stacked bar: a name, an amount, what is shown, a class."""

    name: str
    amount: float
    shown: str
    colour: str


def stacked_bars(rows: Sequence[tuple[str, Sequence[Segment]]], what: str) -> Markup:
    """Return one horizontal bar per row, on a common scale."""
    row_height, label_width = 26, 150
    most = max((sum(piece.amount for piece in pieces) for _, pieces in rows), default=0.0) or 1.0
    scale = Scale(0.0, most, label_width, WIDTH - RIGHT)
    parts = []
    for index, (name, pieces) in enumerate(rows):
        y, done = TOP + index * row_height, 0.0
        parts.append(element("text", name, x=label_width - 8, y=y + 13, class_="tick end"))
        for piece in pieces:
            x = scale.at(done)
            done += piece.amount
            title = element("title", f"{name}, {piece.name}: {piece.shown}")
            width = max(0.5, scale.at(done) - x)
            parts.append(
                element(
                    "rect", title, x=x, y=y, width=width, height=18, class_=f"bar {piece.colour}"
                )
            )
    return _svg(TOP + row_height * len(rows) + 2, what, parts)


def legend(items: Sequence[tuple[str, str]]) -> Markup:
    """Return names with a square of their colour."""
    return element(
        "p",
        *(
            element("span", element("span", class_=f"key {colour}"), name, class_="entry")
            for name, colour in items
        ),
        class_="legend",
    )


def _grid(scale: Scale, label: Callable[[float], str]) -> list[Markup]:
    parts = []
    for value in scale.ticks():
        y = scale.at(value)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", label(value), x=LEFT - 8, y=y + 4, class_="tick end"))
    return parts


def _layer_labels(across: Scale, count: int, height: float) -> list[Markup]:
    step = max(1, int(round_step(count / MAX_X_LABELS)))
    return [
        element(
            "text", str(index), x=across.at(index), y=height - BOTTOM + 16, class_="tick middle"
        )
        for index in range(0, count, step)
    ]


def _svg(height: float, what: str, parts: Sequence[Markup]) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=what)
