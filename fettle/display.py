"""A family as a table for people and as one object for machines."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fettle.family import Family
from fettle.latency import best_rows_per_second, estimate_ms
from fettle.manifest import VariantManifest


def as_json(family: Family) -> dict[str, Any]:
    """Everything that the table shows, and the paths, as plain values."""
    manifest = family.manifest
    return {
        "name": family.name,
        "directory": str(family.directory),
        "source": manifest.source.model_dump(mode="json"),
        "task": manifest.task.model_dump(mode="json"),
        "reference": manifest.reference,
        "default": manifest.default,
        "hardware": manifest.hardware.model_dump(mode="json"),
        "data": {name: split.model_dump(mode="json") for name, split in manifest.data.items()},
        "variants": [summary(variant) for variant in family.variants.values()],
        "not_built": [item.model_dump(mode="json") for item in manifest.not_built],
    }


def summary(variant: VariantManifest) -> dict[str, Any]:
    """One variant's row; speeds are at the typical length of the test rows."""
    row: dict[str, Any] = {
        "id": variant.id,
        "parent": variant.parent,
        "runtime": variant.runtime.value,
        "precision": variant.precision.value,
        "size_bytes": variant.size_bytes,
        "measured": variant.measured is not None,
    }
    if variant.measured is not None:
        found = variant.measured
        row |= {
            "typical_length": found.typical_length,
            "ms_at_batch_1": estimate_ms(found.latency, 1, found.typical_length),
            "best_rows_per_second": best_rows_per_second(found.latency, found.typical_length),
            "threads": found.latency.threads,
            "peak_memory_bytes": found.peak_memory_bytes,
            "rows": found.quality.rows,
            "same_answers": 1 - found.quality.disagreement,
            "max_difference": found.quality.max_difference,
            "batch_invariant": found.batching.invariant,
            "changed_by_batching": found.batching.changed,
            "metric_name": found.quality.metric_name,
            "metric": found.quality.metric,
        }
    return row


def print_table(family: Family, console: Console | None = None) -> None:
    console = console or Console()
    rows = [summary(variant) for variant in family.variants.values()]
    console.print(_table(family, rows))
    for line in _footnotes(family):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    for item in family.manifest.not_built:
        console.print(f"not built: {item.id}: {item.reason}", highlight=False, soft_wrap=True, markup=False)


def _table(family: Family, rows: list[dict[str, Any]]) -> Table:
    metric = next((row["metric_name"] for row in rows if row.get("metric_name")), None)
    columns = ["variant", "runtime", "precision", "size MB", "memory MB", "ms, batch 1", "best rows/s", "same answers"]
    columns += ["batch invariant", *([metric] if metric else [])]
    table = Table(title=f"{family.name}: {_task_in_words(family)}", title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 3 else "right")
    for row in rows:
        mark = " (default)" if row["id"] == family.manifest.default else ""
        style = "bold" if mark else None
        table.add_row(*_cells(row, mark, metric is not None), style=style)
    return table


def _cells(row: dict[str, Any], mark: str, with_metric: bool) -> list[str]:
    cells = [row["id"] + mark, row["runtime"], row["precision"], _megabytes(row["size_bytes"])]
    if not row["measured"]:
        return [*cells, "not measured"]
    invariant = "yes" if row["batch_invariant"] else f"no, {row['changed_by_batching']:.1%} change"
    cells += [
        _megabytes(row["peak_memory_bytes"]),
        f"{row['ms_at_batch_1']:.1f}",
        f"{row['best_rows_per_second']:.0f}",
        f"{row['same_answers']:.2%}",
        invariant,
    ]
    if with_metric:
        cells.append("" if row["metric"] is None else f"{row['metric']:.4f}")
    return cells


def _footnotes(family: Family) -> list[str]:
    reference = family.variant(family.manifest.reference).measured
    if reference is None:
        return []
    where = reference.hardware
    return [
        f"{reference.quality.rows} test rows, {reference.typical_length} tokens at the median; another answer means: "
        f"{reference.quality.loss}.",
        f"{where.accelerator or where.processor}, {reference.latency.threads} of {where.cores} cores.",
    ]


def _task_in_words(family: Family) -> str:
    task = family.manifest.task
    if task.head is None:
        return f"vectors of {task.width}"
    return f"{task.head.value.replace('_', ' ')}, {task.width} output" + "s" * (task.width > 1)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size < 1e7 else f"{size / 1e6:.0f}"
