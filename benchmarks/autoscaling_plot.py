"""A day's load and how many replicas each policy had for it, in one SVG that suits a light and a dark page.

By hand, with no library: `optimize.report_html` writes the elements, `benchmarks.ramp_plot` says how they look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.fleet import Trace
from benchmarks.ramp_plot import LEFT, RIGHT, STYLE, WIDTH
from optimize.report_html import Html, join, tag

PANELS = ((44.0, 224.0), (280.0, 460.0))
HEIGHT = 560.0
MOST = 1.8  # times the height of the lowest line
SMOOTH = 5  # seconds that a point of the lower lines covers


@dataclass(frozen=True, slots=True)
class Curves:
    """What is drawn. `colours`: by policy, the number of its class of `STYLE`, or "alone"."""

    hour_s: float
    work: Sequence[float]
    traces: Mapping[str, Trace]
    colours: Mapping[str, str]

    @property
    def seconds(self) -> int:
        return len(self.work)

    def x(self, second: float) -> float:
        return LEFT + (RIGHT - LEFT) * second / self.seconds


def draw(curves: Curves) -> str:
    """The whole SVG."""
    parts = [
        tag("title", "Replicas over a day: the product's policy, an oracle, and Ray's own policy"),
        tag("style", Html(STYLE)),
        tag("rect", width=WIDTH, height=HEIGHT, class_="page"),
        *_replicas(curves, *PANELS[0]),
        *_missed(curves, *PANELS[1]),
        *_hours(curves, HEIGHT - 60),
    ]
    return tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        width=WIDTH,
        height=HEIGHT,
        role="img",
    )


def _replicas(curves: Curves, top: float, bottom: float) -> list[Html]:
    """All that were asked for, of all variants and the routers; the work that came as an area.

    Who asks for many times as much as others leaves the panel, so that these can be told apart; the legend says how far
    it goes.
    """
    lines = {name: _sums(list(trace.wanted.values())) for name, trace in curves.traces.items()}
    most = MOST * min(max(line) for line in lines.values())

    def y(count: float) -> float:
        return bottom - (bottom - top) * min(count, most) / most

    area = [(0.0, 0.0), *enumerate(_means(curves.work)), (curves.seconds - 1.0, 0.0)]
    parts = [_text(LEFT - 48, top - 16, "Replicas asked for; in grey the work that comes", "title")]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if most / step <= 6)
    for count in range(0, int(most) + 1, step):
        parts += [_rule(y(count)), _text(LEFT - 8, y(count) + 4, str(count), "tick end")]
    parts.append(tag("polygon", points=_points(curves, area, y), class_="area"))
    parts += [_line(curves, line, y, curves.colours[name]) for name, line in lines.items()]
    far = {name: f"{name}, up to {max(line)}" for name, line in lines.items() if max(line) > most}
    return [*parts, *_legend(top, curves, far)]


def _missed(curves: Curves, top: float, bottom: float) -> list[Html]:
    """The share of the requests that were refused or too late."""

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    parts = [_text(LEFT - 48, top - 16, "Requests that were refused or missed the objective, %", "title")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [_rule(y(share)), _text(LEFT - 8, y(share) + 4, f"{100 * share:g}", "tick end")]
    for name, trace in curves.traces.items():
        shares = [
            1 - good / came if came else 0.0 for good, came in zip(_means(trace.good), _means(trace.came), strict=True)
        ]
        parts.append(_line(curves, shares, y, curves.colours[name]))
    return parts


def _hours(curves: Curves, y: float) -> list[Html]:
    hours = range(0, round(curves.seconds / curves.hour_s) + 1, 3)
    parts = [_text(curves.x(hour * curves.hour_s), y, str(hour), "tick middle") for hour in hours]
    said = f"hour of the day; an hour takes {curves.hour_s:g} s"
    return [*parts, _text((LEFT + RIGHT) / 2, y + 24, said, "tick middle")]


def _legend(top: float, curves: Curves, far: Mapping[str, str]) -> list[Html]:
    return [
        join(
            [
                tag("rect", x=RIGHT + 14, y=top + 20 * row, width=12, height=12, class_=f"f{curves.colours[name]}"),
                tag("text", far.get(name, name), x=RIGHT + 32, y=top + 20 * row + 11, class_="tick"),
            ]
        )
        for row, name in enumerate(curves.traces)
    ]


def _sums(columns: Sequence[Sequence[int]]) -> list[int]:
    return [sum(second) for second in zip(*columns, strict=True)]


def _means(values: Sequence[float]) -> list[float]:
    parts = (values[max(0, at - SMOOTH // 2) : at + SMOOTH // 2 + 1] for at in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _points(curves: Curves, places: Sequence[tuple[float, float]], y: Callable[[float], float]) -> str:
    return " ".join(f"{curves.x(second + 0.5):.1f},{y(value):.1f}" for second, value in places)


def _line(curves: Curves, values: Sequence[float], y: Callable[[float], float], colour: str) -> Html:
    """Only where it turns, which keeps the file small."""
    places = [
        (float(at), value)
        for at, value in enumerate(values)
        if at in (0, len(values) - 1) or not values[at - 1] == value == values[at + 1]
    ]
    return tag(
        "polyline", points=_points(curves, places, y), class_="line alone" if colour == "alone" else f"line c{colour}"
    )


def _rule(y: float) -> Html:
    return tag("line", x1=LEFT, y1=f"{y:.1f}", x2=RIGHT, y2=f"{y:.1f}", class_="grid")


def _text(x: float, y: float, text: str, class_: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", class_=class_)
