"""The figures of a comparison: one row a system and number of connections, their medians, the tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.meter import CpuWindow
from benchmarks.offline import Offline

WARN_OTHERS = 0.05


@dataclass(frozen=True, slots=True)
class Figures:
    """One measured window.

    `cpu_s`: CPU seconds of the whole server a good reply. `bad`: replies that were not 200. `others`: the share of
    the machine's CPU that neither the server nor the client used; above some percent the row is not to be trusted.
    Of the checks, `lowest_cosine` is for vectors and `changed`, the share of other answers than the reference's, for
    labels.
    """

    system: str
    is_peer: bool
    connections: int
    rps: float
    p50_ms: float
    p99_ms: float
    cpu_s: float
    requests: int
    bad: int
    client_cpu_s: float
    others: float
    lowest_cosine: float | None = None
    changed: float | None = None

    @classmethod
    def of(cls, name: str, connections: int, report: Mapping[str, Any], cpu: CpuWindow, *, is_peer: bool) -> Figures:
        """From a report of `fettle.bench` and the CPU seconds of its window.

        Raises:
            ValueError: no good reply in the window, or a reply that does not decode.
        """
        good = report["statuses"].get("200", 0)
        if not good:
            raise ValueError(f"no good reply at {connections} connections: {report['statuses']}")
        if report["checked"]["problems"]:
            raise ValueError(report["checked"]["problems"][0])
        return cls(
            name,
            is_peer,
            connections,
            report["rps"],
            report["p50_ms"],
            report["p99_ms"],
            cpu.server_s / good,
            good,
            report["requests"] - good,
            report["client_cpu_s"],
            cpu.others(report),
        )


def medians(rows: Sequence[Figures]) -> list[Figures]:
    """One row for each system and number of connections, in order of appearance; counts are summed over the rounds."""
    groups: dict[tuple[str, int], list[Figures]] = {}
    for row in rows:
        groups.setdefault((row.system, row.connections), []).append(row)
    return [_merge(group) for group in groups.values()]


def median_limit(limits: Sequence[Offline]) -> Offline:
    """The limit in the middle by speed; the slower of the two in the middle of an even number."""
    return sorted(limits, key=lambda limit: limit.rows_per_second)[(len(limits) - 1) // 2]


def _merge(group: Sequence[Figures]) -> Figures:
    def middle(name: str) -> float:
        return float(statistics.median(getattr(row, name) for row in group))

    return replace(
        group[0],
        rps=middle("rps"),
        p50_ms=middle("p50_ms"),
        p99_ms=middle("p99_ms"),
        cpu_s=middle("cpu_s"),
        client_cpu_s=middle("client_cpu_s"),
        others=max(row.others for row in group),
        requests=sum(row.requests for row in group),
        bad=sum(row.bad for row in group),
        lowest_cosine=min((row.lowest_cosine for row in group if row.lowest_cosine is not None), default=None),
        changed=max((row.changed for row in group if row.changed is not None), default=None),
    )


def best_peers(rows: Sequence[Figures]) -> dict[int, float]:
    """Requests a second of the fastest peer, by connections."""
    best: dict[int, float] = {}
    for row in rows:
        if row.is_peer:
            best[row.connections] = max(best.get(row.connections, 0.0), row.rps)
    return best


def as_object(rows: Sequence[Figures], limits: Mapping[str, Offline], failed: Mapping[str, str]) -> dict[str, Any]:
    """The same as the tables, as plain values."""
    peers = best_peers(rows)
    results = []
    for row in rows:
        against = {"ratio_to_best_peer": row.rps / peers[row.connections]} if row.connections in peers else {}
        against |= {"share_of_limit": row.rps / limits[row.system].rows_per_second} if row.system in limits else {}
        results.append({key: _rounded(value) for key, value in (asdict(row) | against).items()})
    offline = {name: {key: _rounded(value) for key, value in asdict(limit).items()} for name, limit in limits.items()}
    return {"results": results, "offline": offline, "failed": dict(failed)}


def print_tables(rows: Sequence[Figures], limits: Mapping[str, Offline], failed: Mapping[str, str]) -> None:
    console = Console(width=140)
    console.print(_served_table(rows, limits))
    if limits:
        console.print(_limit_table(limits))
    if any(row.others > WARN_OTHERS for row in rows):
        console.print(f"WARNING: something else took over {WARN_OTHERS:.0%} of the machine in some rows (others)")
    for name, reason in failed.items():
        console.print(f"failed: {name}: {reason}", markup=False)


def _served_table(rows: Sequence[Figures], limits: Mapping[str, Offline]) -> Table:
    table = _table(
        "system",
        "connections",
        "req/s",
        "p50 ms",
        "p99 ms",
        "CPU ms/req",
        "x best peer",
        "of limit",
        "cosine" if any(row.lowest_cosine is not None for row in rows) else "changed",
        "not 200",
        "others",
    )
    peers = best_peers(rows)
    for row in rows:
        peer = peers.get(row.connections)
        limit = limits.get(row.system)
        table.add_row(
            row.system,
            str(row.connections),
            f"{row.rps:.1f}",
            f"{row.p50_ms:.1f}",
            f"{row.p99_ms:.1f}",
            f"{row.cpu_s * 1000:.1f}",
            f"{row.rps / peer:.2f}" if peer else "",
            f"{row.rps / limit.rows_per_second:.0%}" if limit else "",
            _checked(row),
            str(row.bad),
            f"{row.others:.0%}",
        )
    return table


def _checked(row: Figures) -> str:
    if row.lowest_cosine is not None:
        return f"{row.lowest_cosine:.4f}"
    return "" if row.changed is None else f"{row.changed:.2%}"


def _limit_table(limits: Mapping[str, Offline]) -> Table:
    table = _table("offline limit", "rows/s", "CPU ms/row", "processes x threads", "batch", "rows")
    for name, limit in limits.items():
        table.add_row(
            name,
            f"{limit.rows_per_second:.1f}",
            f"{limit.cpu_s * 1000:.1f}",
            f"{limit.processes} x {limit.threads}",
            str(limit.batch),
            str(limit.rows),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
