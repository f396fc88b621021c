"""A plan for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_plan(found: Mapping[str, Any], console: Console) -> None:
    """A table with a row for each mix and one for the reference alone; then who answers, and how far each tier goes."""
    console.print(
        f"{found['family']}: {found['rate']:g} requests/s, p{found['percentile']:g} within {found['latency_ms']:g} ms, "
        f"{found['mean_tokens']:g} tokens a text; costs as measured on {found['hardware']['processor']}",
        highlight=False,
    )
    rows = [*found["plans"], found["reference_alone"]]
    made = Table(box=box.SIMPLE)
    for name in ("mix", "nodes", "routers", "replicas", "p50", "p99 ms"):
        words = name in ("mix", "replicas")
        made.add_column(name, justify="left" if words else "right", no_wrap=name == "replicas")
    priced = rows[0]["cost_per_million"] is not None
    made.add_column("per million" if priced else "node hours/million", justify="right")
    for row in rows:
        replicas = "\n".join(f"{count:,} {name}" for name, count in row["replicas"].items())
        latencies = row["latency_ms"].values()
        made.add_row(
            row["mix"],
            f"{row['nodes']:,}",
            f"{row['routers']:,}",
            replicas,
            *(f"{max(each[rank] for each in latencies):.1f}" for rank in ("p50", "p99")),
            f"{row['cost_per_million' if priced else 'node_hours_per_million']:.4g}"
            + ("" if row["kept"] else " (missed)"),
        )
    console.print(made)
    for row in rows:
        console.print(f"[bold]{row['mix']}[/]", highlight=False)
        if not row["kept"]:
            console.print("  the objective is out of reach: a request takes longer even where it waits for nothing")
        for name, points in row["points"].items():
            parts = ", ".join(f"{share:.0%} by {point}" for point, share in points.items())
            latency = row["latency_ms"][name]
            ranks = "  ".join(f"{rank} {ms:g}" for rank, ms in latency.items())
            console.print(f"  {name}: {parts or 'nothing was answered'};  {ranks} ms", highlight=False, soft_wrap=True)
        if row["one_machine"]:
            console.print("  one machine whose replicas share its cores, as `fettle serve` starts it", highlight=False)
        for words in row["limits"] if row is rows[0] else ():
            console.print(f"  {words}", highlight=False, soft_wrap=True)
