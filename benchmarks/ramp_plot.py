"""The ramp as a picture: load, latency and gears over time, in one SVG that suits a light and a dark page.

By hand, with no library: `optimize.report_html` writes the elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.seconds import Seconds
from optimize.report_html import Html, join, tag

WIDTH, LEFT, RIGHT = 940.0, 64.0, 760.0
SMOOTH = 3  # seconds that one point of a latency line covers
STYLE = """
svg { font: 13px system-ui, sans-serif; }
svg { --ink: #1b1f24; --soft: #59636e; --grid: #d8dee4; --page: #ffffff; --alone: #c62828;
      --c0: #3b3f46; --c1: #1f6feb; --c2: #13795b; --c3: #b35900; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --soft: #9aa5b1; --grid: #30363d; --page: #0d1117; --alone: #ff7b72;
        --c0: #c9d1d9; --c1: #6cb0ff; --c2: #4cc38a; --c3: #f0a04b; }
}
.page { fill: var(--page); }
text { fill: var(--ink); } .tick { fill: var(--soft); font-size: 12px; } .title { font-weight: 600; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: var(--grid); stroke-width: 1; } .objective { stroke: var(--ink); stroke-dasharray: 2 4; }
.area { fill: var(--soft); fill-opacity: .18; } .refused { fill: var(--alone); fill-opacity: .35; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .alone { stroke: var(--alone); stroke-dasharray: 6 4; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); } .f3 { fill: var(--c3); }
.falone { fill: var(--alone); }
.bar { fill: var(--ink); font-size: 12px; }
"""


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is drawn: every class by second, and `exact` alone on the same ramp. `capacity` in requests a second."""

    capacity: float
    objective_ms: float
    classes: Sequence[Seconds]
    alone: Seconds

    @property
    def seconds(self) -> int:
        return len(self.alone.offered)

    def x(self, second: float) -> float:
        return LEFT + (RIGHT - LEFT) * second / self.seconds


def draw(drawing: Drawing) -> str:
    """The whole SVG."""
    load, latency, gears = _load(drawing, 44, 170), _latency(drawing, 226, 416), _gears(drawing, 470)
    height = 470 + 30 * len(drawing.classes) + 46
    parts = [
        tag("title", "A load ramp in four quality classes, and on the reference alone"),
        tag("style", Html(STYLE)),
        tag("rect", width=WIDTH, height=height, class_="page"),
        *load,
        *latency,
        *gears,
        *_time_axis(drawing, height - 34),
    ]
    return tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        width=WIDTH,
        height=height,
        role="img",
    )


def _load(drawing: Drawing, top: float, bottom: float) -> list[Html]:
    """Offered as an area, what the classes and the reference alone answered as lines, all of the capacity."""
    offered = _sums([found.offered for found in drawing.classes])
    answered = _sums([found.answered for found in drawing.classes])
    most = max(*offered, 1) / drawing.capacity

    def y(rate: float) -> float:
        return bottom - (bottom - top) * rate / drawing.capacity / most

    area = [(0.0, 0.0), *enumerate(_smooth(offered)), (drawing.seconds - 1.0, 0.0)]
    ticks = [step for step in (0.5, 1, 2, 3, 4, 5) if step <= most * 1.02]
    parts = [_text(LEFT - 48, top - 16, "Load, % of what the reference can answer", "title")]
    for step in ticks:
        parts += [_rule(y(step * drawing.capacity), "grid"), _tick(y(step * drawing.capacity), f"{100 * step:g}")]
    parts.append(tag("polygon", points=_points(drawing, area, y), class_="area"))
    parts.append(_line(drawing, _smooth(answered), y, "line c1"))
    parts.append(_line(drawing, _smooth(drawing.alone.answered), y, "line alone"))
    parts += _legend(top, [("offered", "tick"), ("answered", "f1"), ("answered, exact alone", "falone")])
    return parts


def _latency(drawing: Drawing, top: float, bottom: float) -> list[Html]:
    """p99 by class on a logarithmic scale."""
    lines = [_peaks(found.p99_ms) for found in drawing.classes]
    alone = _peaks(drawing.alone.p99_ms)
    known = [value for line in (*lines, alone) for value in line if value]
    low, high = 10 ** math.floor(math.log10(min(known))), 10 ** math.ceil(math.log10(max(*known, 1000)))

    def y(ms: float) -> float:
        return bottom - (bottom - top) * math.log(ms / low) / math.log(high / low)

    parts = [_text(LEFT - 48, top - 16, "Latency, p99 in ms", "title")]
    value = float(low)
    while value <= high:
        parts += [_rule(y(value), "grid"), _tick(y(value), f"{value:g}")]
        value *= 10
    parts.append(_rule(y(drawing.objective_ms), "objective"))
    parts.append(_text(LEFT + 6, y(drawing.objective_ms) - 5, f"objective {drawing.objective_ms:g} ms", "tick"))
    parts.append(_line(drawing, alone, y, "line alone"))
    parts += [_line(drawing, line, y, f"line c{number}") for number, line in enumerate(lines)]
    names = [(found.tag, f"f{number}") for number, found in enumerate(drawing.classes)]
    return [*parts, *_legend(top, [*names, ("exact alone", "falone")])]


def _gears(drawing: Drawing, top: float) -> list[Html]:
    """One bar a class; the cheaper the gear, the fuller its colour."""
    parts: list[Html] = [
        _text(LEFT - 48, top - 16, "Gear: the fuller the colour, the cheaper the point that answers", "title")
    ]
    for row, found in enumerate(drawing.classes):
        y = top + 30 * row
        most = max((gear for gear in found.gear if gear is not None), default=0)
        parts.append(_text(LEFT - 8, y + 15, found.tag, "tick end"))
        for start, end, gear in _runs(found.gear):
            strength = 0.12 + 0.48 * (gear / most if most else 0)  # its name must stay legible
            x = drawing.x(start)
            wide, shade = f"{drawing.x(end) - x:.1f}", f"{strength:.2f}"
            point = found.point[start] or "the reference"
            inside = tag("title", point)
            parts.append(
                tag("rect", inside, x=f"{x:.1f}", y=y, width=wide, height=22, fill_opacity=shade, class_=f"f{row}")
            )
            if drawing.x(end) - x > 90:
                parts.append(tag("text", point, x=f"{x + 6:.1f}", y=y + 15, class_="bar"))
    return parts


def _time_axis(drawing: Drawing, y: float) -> list[Html]:
    step = 20 if drawing.seconds > 60 else 10
    marks = range(0, drawing.seconds + 1, step)
    parts = [_text(drawing.x(second), y + 6, str(second), "tick middle") for second in marks]
    return [*parts, _text((LEFT + RIGHT) / 2, y + 26, "seconds", "tick middle")]


def _runs(gears: Sequence[int | None]) -> list[tuple[int, int, int]]:
    """(from, to, gear) for stretches of one gear; gaps belong to what was before."""
    runs: list[tuple[int, int, int]] = []
    for second, gear in enumerate(gears):
        if gear is not None and (not runs or runs[-1][2] != gear):
            runs.append((second, second + 1, gear))
        elif runs:
            runs[-1] = (runs[-1][0], second + 1, runs[-1][2])
    return runs


def _sums(columns: Sequence[Sequence[int]]) -> list[int]:
    return [sum(second) for second in zip(*columns, strict=True)]


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over a few seconds, since Poisson counts jump."""
    return [
        sum(part) / len(part)
        for part in (values[max(0, at - SMOOTH // 2) : at + SMOOTH // 2 + 1] for at in range(len(values)))
    ]


def _peaks(values: Sequence[float | None]) -> list[float | None]:
    """The worst over a few seconds; nothing where there is nothing."""
    parts = [values[max(0, at - SMOOTH // 2) : at + SMOOTH // 2 + 1] for at in range(len(values))]
    return [max((value for value in part if value is not None), default=None) for part in parts]


def _points(drawing: Drawing, places: Sequence[tuple[float, float]], y: Callable[[float], float]) -> str:
    return " ".join(f"{drawing.x(second + 0.5):.1f},{y(value):.1f}" for second, value in places)


def _line(drawing: Drawing, values: Sequence[float | None], y: Callable[[float], float], class_: str) -> Html:
    places = [(float(second), value) for second, value in enumerate(values) if value is not None]
    return tag("polyline", points=_points(drawing, places, y), class_=class_)


def _legend(top: float, names: Sequence[tuple[str, str]]) -> list[Html]:
    return [
        join(
            [
                tag("rect", x=RIGHT + 14, y=top + 20 * row, width=12, height=12, class_=class_),
                tag("text", name, x=RIGHT + 32, y=top + 20 * row + 11, class_="tick"),
            ]
        )
        for row, (name, class_) in enumerate(names)
    ]


def _rule(y: float, class_: str) -> Html:
    return tag("line", x1=LEFT, y1=f"{y:.1f}", x2=RIGHT, y2=f"{y:.1f}", class_=class_)


def _tick(y: float, text: str) -> Html:
    return _text(LEFT - 8, y + 4, text, "tick end")


def _text(x: float, y: float, text: str, class_: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_)
