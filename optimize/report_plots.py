"""The report's drawings as inline SVG: the frontier, heat maps, reliability plots. The style sheet colours them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest

from fettle.manifest import ScoreCalibration
from fettle.policy import frontier
from optimize.report_facts import Facts, Lever
from optimize.report_html import Html, percent_of, tag
from optimize.report_labels import Box, Canvas
from optimize.report_words import at_most, recipe_in_words

SMALLEST_SHARE = 1e-4
DECADES = 1.25
NUMBERS_FROM = 22.0
DARK_CELL = 0.55


@dataclass(frozen=True, slots=True)
class Mark:
    """A dot or a diamond of the frontier plot. `cost` in ms, `share` of answers that differ, up to `bound` at most."""

    name: str
    cost: float
    share: float
    kind: str
    tip: str
    bound: float | None = None
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """Logarithmic from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2, 5, 10 ... within the scale."""
        first = math.floor(math.log10(self.low))
        last = math.ceil(math.log10(self.high))
        values = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
        return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]


@dataclass
class Frontier:
    """One drawing at one width; `numbered` collects the marks whose names found no room."""

    facts: Facts
    marks: list[Mark]
    width: float
    height: float
    numbered: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left, self.right, self.top, self.bottom = 58.0, self.width - 14.0, 16.0, self.height - 90.0
        costs = [mark.cost for mark in self.marks]
        shares = [value for mark in self.marks for value in (mark.share, mark.bound or 0) if value > 0] or [0.01]
        self.x = Scale(min(costs) / DECADES, max(costs) * DECADES, self.left, self.right)
        lowest = max(min(shares), SMALLEST_SHARE)
        self.y = Scale(lowest / DECADES, max(max(shares), 2 * lowest) * DECADES, self.bottom, self.top)
        self.zero = self.bottom + 30.0

    def svg(self) -> Html:
        canvas = Canvas(Box(self.left, self.top - 8, self.right, self.zero + 16))
        places = [(self.x(mark.cost), self._height(mark.share)) for mark in self.marks]
        steps = self._steps()
        canvas.block(Box(self.left, self.zero - 1, self.right, self.zero + 1))
        for (x0, y0), (x1, y1) in pairwise(steps):
            canvas.block(Box(x0 - 1, min(y0, y1) - 1, x1 + 1, max(y0, y1) + 1))
        for (x, y), mark in zip(places, self.marks, strict=True):
            canvas.block(Box(x - 7, y - 7, x + 7, y + 7))
            if mark.bound is not None:
                canvas.block(Box(x - 4, self._height(mark.bound) - 2, x + 4, y))
        labels = [self._label(canvas, x, y, mark) for (x, y), mark in zip(places, self.marks, strict=True)]
        drawn = [self._mark(x, y, mark) for (x, y), mark in zip(places, self.marks, strict=True)]
        return tag(
            "svg",
            *self._axes(),
            tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in steps), class_="best"),
            *labels,
            *drawn,
            viewBox=f"0 0 {self.width:.0f} {self.height:.0f}",
            width=self.width,
            height=self.height,
            role="group",
            aria_label="Cost and disagreement of each variant and operating point",
        )

    def _height(self, share: float) -> float:
        return self.y(share) if share > 0 else self.zero

    def _axes(self) -> list[Html]:
        parts = []
        for value in _thinned(self.x, 44):
            parts.append(_line(self.x(value), self.top, self.x(value), self.zero + 8, "grid"))
            parts.append(_text(self.x(value), self.zero + 24, f"{value:g}", "tick middle"))
        for value in _thinned(self.y, 22):
            parts.append(_line(self.left, self.y(value), self.right, self.y(value), "grid"))
            parts.append(_text(self.left - 8, self.y(value) + 4, f"{100 * value:g}", "tick end"))
        parts.append(_line(self.left, self.zero, self.right, self.zero, "axis"))
        parts.append(_text(self.left - 8, self.zero + 4, "0", "tick end"))
        middle = (self.bottom + self.zero) / 2
        for shift in (-3, 3):
            parts.append(_line(self.left - 5, middle + shift + 2, self.left + 5, middle + shift - 2, "axis"))
        parts.append(
            _text((self.left + self.right) / 2, self.height - 14, f"{self.facts.cost_unit} (log scale)", "name middle")
        )
        x, y = 14.0, (self.top + self.bottom) / 2
        parts.append(_text(x, y, "differs from the original, %", "name middle", transform=f"rotate(-90 {x:g} {y:g})"))
        return parts

    def _steps(self) -> list[tuple[float, float]]:
        """Corners of the line through the variants in the family that no other beats."""
        points = {mark.name: (mark.cost, mark.share) for mark in self.marks if mark.bound is None and not mark.faint}
        best = sorted(points[name] for name in frontier(points))
        ends = [(self.x(cost), self._height(share)) for cost, share in best]
        corners = [(right[0], left[1]) for left, right in pairwise(ends)]
        return [place for pair in zip_longest(ends, corners) for place in pair if place is not None]

    def _label(self, canvas: Canvas, x: float, y: float, mark: Mark) -> Html | None:
        spot = canvas.place(x, y, mark.name)
        text = mark.name
        if spot is None:
            self.numbered.append(mark)
            text = str(len(self.numbered))
            spot = canvas.place(x, y, text, far=True)
        if spot is None:
            return None
        leader = _line(x, y, *spot.nearest(x, y), "leader") if spot.distance(x, y) > 12 else None
        name = _text(spot.left, spot.bottom - 4, text, "label faint" if mark.faint else "label")
        return tag("g", leader, name)

    def _mark(self, x: float, y: float, mark: Mark) -> Html:
        parts: list[Html] = [tag("title", mark.tip)]
        if mark.bound is not None:
            top = self._height(mark.bound)
            parts += [_line(x, y, x, top, "whisker"), _line(x - 5, top, x + 5, top, "whisker")]
            parts.append(tag("path", d=f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z", class_="diamond"))
        else:
            parts.append(tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=5.5, class_=f"dot {mark.kind}"))
        return tag(
            "g",
            tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=14, class_="touch"),
            *parts,
            class_="mark faint" if mark.faint else "mark",
            tabindex="0",
            role="img",
            aria_label=mark.tip,
            data_tip=mark.tip,
        )


def marks_of(facts: Facts) -> list[Mark]:
    """All that has a cost and a disagreement; operating points last, so that they are drawn on top."""
    marks = []
    for item in facts.tried.values():
        if item.cost is None or item.disagreement is None:
            continue
        away = f"; dropped: {item.dropped}" if item.dropped else ""
        made = "; then ".join(f"{step.id}: {recipe_in_words(step)}" for step in facts.lineage(item))
        tip = (
            f"{item.id}{away}: {item.cost:.2f} {facts.cost_unit}, differs on {percent_of(item.disagreement)} of the "
            f"answers. Made so: {made}."
        )
        marks.append(Mark(item.id, item.cost, item.disagreement, item.lever.value, tip, faint=item.dropped is not None))
    # Their costs are processor time, and only comparable with that.
    for point in facts.manifest.points if facts.processor_time else []:
        cost = point.test.cpu_ms_per_row if point.test else point.expected_cpu_ms
        share = point.test.disagreement if point.test else point.tuned_disagreement
        if cost <= 0:
            continue
        name = ", ".join(at_most(alpha) for alpha in facts.levels_of(point))
        tip = (
            f"operating point {point.id}: {cost:.2f} CPU ms per row, differs on {percent_of(share)} of the test rows, "
            f"certified at no more than {percent_of(point.certificate.upper_bound)}"
        )
        marks.append(Mark(name, cost, share, "point", tip, bound=point.certificate.upper_bound))
    return marks


def levers_shown(marks: Sequence[Mark]) -> list[Lever]:
    return [lever for lever in Lever if any(mark.kind == lever.value for mark in marks)]


def heat_map(rows: Sequence[Sequence[float]], row_name: str, column_name: str) -> Html:
    """Values in [0, 1], row by row from the top; figures are percent where a cell has room for them."""
    columns = max(len(row) for row in rows)
    size = max(8.0, min(26.0, 600 / columns))
    left, top = 24.0, 20.0
    parts = [_text(0, 11, f"{row_name} ↓  {column_name} →", "tick")]
    for y, row in enumerate(rows):
        parts.append(_text(left - 6, top + (y + 0.5) * size + 4, str(y + 1), "tick end"))
        for x, value in enumerate(row):
            where = {"x": f"{left + x * size:.1f}", "y": f"{top + y * size:.1f}"}
            tip = f"{row_name} {y + 1}, {column_name} {x + 1}: {value:.2f}"
            strength = f"{0.06 + 0.94 * min(max(value, 0.0), 1.0):.2f}"
            cell = {"width": f"{size - 1:.1f}", "height": f"{size - 1:.1f}", "fill-opacity": strength}
            parts.append(tag("rect", tag("title", tip), **where, **cell, class_="heat"))
            if size >= NUMBERS_FROM:
                shade = "on middle" if value > DARK_CELL else "off middle"
                parts.append(
                    _text(left + (x + 0.5) * size, top + (y + 0.5) * size + 4, f"{100 * value:.0f}", f"cell {shade}")
                )
    width, height = left + columns * size + 2, top + len(rows) * size + 2
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        role="img",
        aria_label=f"Importance by {row_name} and {column_name}",
    )


def reliability(scores: ScoreCalibration) -> Html:
    """Agreement over mean score; the area of a dot and the bar below it follow the rows of its bin."""
    left, top, side, below = 34.0, 8.0, 170.0, 36.0
    bottom = top + side
    most = max((item.rows for item in scores.bins), default=0) or 1
    parts = [
        tag("rect", x=left, y=top, width=side, height=side, class_="frame"),
        _line(left, bottom, left + side, top, "diagonal"),
    ]
    for value in (0.0, 0.5, 1.0):
        parts.append(_text(left - 5, bottom - value * side + 4, f"{value:g}", "tick end"))
    for item in scores.bins:
        if not item.rows:
            continue
        x, y = left + item.mean_score * side, bottom - item.agreed * side
        tip = f"scores {item.low:.2f} to {item.high:.2f}: {item.rows:,} rows, {percent_of(item.agreed)} agree"
        tall = max(1.0, item.rows / most * (below - 6))
        start, width = left + item.low * side, max(1.5, (min(item.high, 1.0) - item.low) * side - 1)
        parts.append(
            tag(
                "g",
                tag("title", tip),
                tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{2.5 + 5 * math.sqrt(item.rows / most):.1f}"),
                tag("rect", x=f"{start:.1f}", y=f"{bottom + below - tall:.1f}", width=f"{width:.1f}", height=tall),
                class_="bin",
            )
        )
    parts += [
        _text(left + place * side, bottom + below + 14, word, "tick middle")
        for place, word in ((0, "0"), (0.5, "score"), (1, "1"))
    ]
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {left + side + 12:.0f} {bottom + below + 20:.0f}",
        width=f"{left + side + 12:.0f}",
        role="img",
        aria_label=f"Agreement by score, {scores.variant}, stage {scores.stage + 1}",
    )


def _thinned(scale: Scale, gap: float) -> list[float]:
    """Ticks at least `gap` apart; powers of ten go first."""
    kept: list[float] = []
    for value in sorted(scale.ticks(), key=lambda tick: (math.log10(tick) % 1 > 1e-9, tick)):
        if all(abs(scale(value) - scale(other)) >= gap for other in kept):
            kept.append(value)
    return kept


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def _text(x: float, y: float, text: str, class_: str, transform: str | None = None) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_, transform=transform)
