"""A load for people: a line of progress while it runs, tables afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fettle.bench.crew import Tick, percentile

COLUMNS = ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "p99.9_ms", "max_ms")


def progress(tick: Tick, seconds: float) -> str:
    """One second of a load in a line."""
    p50, p99 = percentile(tick.ms, 0.5), percentile(tick.ms, 0.99)
    latency = "" if p50 is None or p99 is None else f"  p50 {p50:.1f} ms  p99 {p99:.1f} ms"
    other = f"  {tick.other} others" if tick.other else ""
    return (
        f"{tick.second:4d}/{seconds:.0f} s  {tick.good} answered{other}  {tick.flying} under way{latency}"
        f"  client {tick.cpu_s:.0%} of a core"
    )


def print_report(found: Mapping[str, Any], console: Console) -> None:
    """The tables, the errors by kind, and the warnings."""
    console.print(_head(found))
    console.print(_latencies(found))
    if "ttft_ms" in found:
        console.print(_generation(found))
    for word in found["warnings"]:
        console.print(f"[yellow]warning:[/] {word}", highlight=False, soft_wrap=True)
    if found["interrupted"]:
        console.print("[yellow]interrupted:[/] these are the figures of the window until then", highlight=False)


def _head(found: Mapping[str, Any]) -> str:
    statuses = ", ".join(f"{count} x {status}" for status, count in found["statuses"].items()) or "no replies"
    problems = "".join(f"; {count} x {word}" for word, count in found.get("problems", {}).items())
    client = found["client"]
    lines = [f"{found['rps']:g} requests/s answered in {found['window_s']:g} s: {statuses}{problems}"]
    if "tokens_per_s" in found:
        lines.append(f"{found['tokens_per_s']:g} tokens/s; {found['tokens_a_piece']:g} tokens a piece of the stream")
    if "goodput_rps" in found:
        lines.append(f"goodput {found['goodput_rps']:g} requests/s, {found['kept']:.2%} of all kept the objectives")
    lag = client["send_lag_p99_ms"]
    late = "" if lag is None else f", p99 of its sends {lag:g} ms late"
    lines.append(
        f"client: {client['clients']} processes, the busiest used {client['busiest_client']:.0%} of a core{late}"
    )
    return "\n".join(lines)


def _latencies(found: Mapping[str, Any]) -> Table:
    made = Table("", "rate/s", "mean", *(name.removesuffix("_ms") for name in COLUMNS), "others", box=box.SIMPLE)
    made.title = "latency in ms"
    for column in made.columns[1:]:
        column.justify = "right"
    goodput = "goodput_rps" in found
    if goodput:
        made.add_column("kept/s", justify="right")
    rows = {"all": found, **found.get("classes", {})}
    rows |= {f"by {name}": row for name, row in found["points"].items()}
    for name, row in rows.items():
        others = row["requests"] - row["statuses"].get("200", 0)
        cells = [f"{row['rps']:g}", _ms(row["mean_ms"]), *(_ms(row[column]) for column in COLUMNS), str(others)]
        made.add_row(name, *cells, *([f"{row['goodput_rps']:g}"] if goodput else []))
    return made


def _generation(found: Mapping[str, Any]) -> Table:
    made = Table("", *(name.removesuffix("_ms") for name in COLUMNS), title="generation, in ms", box=box.SIMPLE)
    for column in made.columns[1:]:
        column.justify = "right"
    names = {
        "ttft_ms": "time to first token",
        "tpot_ms": "time per output token",
        "inter_token_ms": "between pieces",
    }
    for key, name in names.items():
        made.add_row(name, *(_ms(found[key][column]) for column in COLUMNS))
    made.add_row("end to end", *(_ms(found[column]) for column in COLUMNS))
    return made


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
