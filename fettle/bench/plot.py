"""A load as a drawing: latency and rate over time, and how latency is distributed. One SVG, or a page around it."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 760.0, 520.0
LEFT, RIGHT = 64.0, 744.0
RANKS = {"p50_ms": 0.5, "p90_ms": 0.9, "p95_ms": 0.95, "p99_ms": 0.99, "p99.9_ms": 0.999, "max_ms": 1.0}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.grid{stroke:#ddd}.p50{stroke:#2a6fb0}.p99{stroke:#c2410c}"
    ".rate{stroke:#3f7d3f}.line{fill:none;stroke-width:1.8}.end{text-anchor:end}.middle{text-anchor:middle}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}}"
)


def write(found: Mapping[str, Any], title: str, path: Path) -> None:
    """To a file; `.svg` is the drawing alone, anything else a page."""
    drawing = draw(found, title)
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>{drawing}'
    path.write_text(drawing if path.suffix == ".svg" else page, encoding="utf-8")


def draw(found: Mapping[str, Any], title: str) -> str:
    """Above, answers a second and p50 and p99 by second; below, latency by percentile."""
    seconds = found["seconds"]
    over_time = {name: [second[f"{name}_ms"] for second in seconds] for name in ("p50", "p99")}
    ranked = [(rank, found[name]) for name, rank in RANKS.items() if found[name]]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img">',
        f"<style>{STYLE}</style><title>{html.escape(title)}</title>",
        _text(LEFT, 18, html.escape(title)),
        *_over_time([second["good"] for second in seconds], "answered/s", ["rate"], 40.0, 130.0),
        *_latencies(over_time, 170.0, 330.0),
        *_percentiles(ranked, 370.0, 490.0),
        "</svg>",
    ]
    return "".join(parts)


def _over_time(values: Sequence[float], name: str, classes: Sequence[str], top: float, bottom: float) -> list[str]:
    high = max([*values, 1.0])
    ticks = [0.0, high / 2, high]
    parts = [_text(LEFT, top - 6, name)]
    for tick in ticks:
        y = bottom - (bottom - top) * tick / high
        parts += [_grid(y), _text(LEFT - 6, y + 4, f"{tick:.3g}", "end")]
    places = [(_x(index, len(values)), bottom - (bottom - top) * value / high) for index, value in enumerate(values)]
    return [*parts, _line(places, classes[0])]


def _latencies(lines: Mapping[str, Sequence[float | None]], top: float, bottom: float) -> list[str]:
    known = [value for line in lines.values() for value in line if value]
    if not known:
        return [_text(LEFT, top, "no answers")]
    low, high = min(known) / 1.2, max(known) * 1.2
    parts = [_text(LEFT, top - 6, "latency in ms by second: p50 (blue), p99 (red), log scale")]
    for tick in _ticks(low, high):
        y = _y(tick, low, high, top, bottom)
        parts += [_grid(y), _text(LEFT - 6, y + 4, f"{tick:g}", "end")]
    for name, line in lines.items():
        places = [(_x(i, len(line)), _y(v, low, high, top, bottom)) for i, v in enumerate(line) if v]
        parts.append(_line(places, name))
    for second in range(0, len(next(iter(lines.values()))), max(1, len(next(iter(lines.values()))) // 8)):
        parts.append(_text(_x(second, len(next(iter(lines.values())))), bottom + 16, f"{second} s", "middle"))
    return parts


def _percentiles(ranked: Sequence[tuple[float, float]], top: float, bottom: float) -> list[str]:
    if not ranked:
        return []
    low, high = min(ms for _, ms in ranked) / 1.2, max(ms for _, ms in ranked) * 1.2
    parts = [_text(LEFT, top - 6, "latency in ms by percentile")]
    for tick in _ticks(low, high):
        y = _y(tick, low, high, top, bottom)
        parts += [_grid(y), _text(LEFT - 6, y + 4, f"{tick:g}", "end")]
    places = []
    for number, (rank, ms) in enumerate(ranked):
        x, y = _x(number, len(ranked)), _y(ms, low, high, top, bottom)
        places.append((x, y))
        name = "max" if rank == 1 else f"p{100 * rank:g}"
        parts += [_text(x, bottom + 18, f"{name}: {ms:.4g}", "middle" if 0 < number < len(ranked) - 1 else "")]
    return [*parts, _line(places, "p99")]


def _x(index: int, count: int) -> float:
    return LEFT + (RIGHT - LEFT - 60) * index / max(1, count - 1)


def _y(value: float, low: float, high: float, top: float, bottom: float) -> float:
    return bottom - (bottom - top) * math.log(value / low) / math.log(high / low)


def _ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _line(places: Sequence[tuple[float, float]], class_: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" class="line {class_}"/>'


def _grid(y: float) -> str:
    return f'<line x1="{LEFT:g}" x2="{RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'


def _text(x: float, y: float, text: str, class_: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{class_}">{text}</text>'
