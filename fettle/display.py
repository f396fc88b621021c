"""A family as a table for people and as one object for machines."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fettle.family import Family
from fettle.latency import best_rows_per_second, estimate_ms
from fettle.manifest import Level, OperatingPoint, TaskKind, VariantManifest

# Headers are broken here, so that a table is as narrow as it can be.
CPU_MS = "CPU ms\na row"


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
        "points": [point_summary(point) for point in manifest.points],
        "votes": [vote.model_dump(mode="json") for vote in manifest.votes],
        "levels": [level.model_dump(mode="json") for level in manifest.levels],
        "dropped": [item.model_dump(mode="json") for item in manifest.dropped],
        "not_built": [item.model_dump(mode="json") for item in manifest.not_built],
    }


def point_summary(point: OperatingPoint) -> dict[str, Any]:
    """An operating point as it is in the manifest, with what the table derives from it."""
    return {**point.model_dump(mode="json"), "relative_cost": relative_cost(point), "path": path_in_brief(point)}


def relative_cost(point: OperatingPoint) -> float | None:
    """Processor time of a row on test, as a share of the original's (float32 on ONNX Runtime) in the same run."""
    return None if point.test is None else point.test.cpu_ms_per_row / point.test.reference_cpu_ms_per_row


def path_in_brief(point: OperatingPoint) -> str:
    """Its variants in order, each with the share of the test rows that each of its stages answers."""
    if point.test is None:
        return ", then ".join(step.variant for step in point.steps)
    shares = [" + ".join(f"{share:.1%}" for share in stages) for stages in point.test.answered]
    return ", then ".join(f"{step.variant} {share}" for step, share in zip(point.steps, shares, strict=True))


def certificate_in_words(point: OperatingPoint) -> str:
    found = point.certificate
    return (
        f"{point.id}: at most {found.alpha:.2%} at confidence {1 - found.delta:.0%}; {found.errors:,} errors in "
        f"{found.rows:,} rows of {found.source}, bound {found.upper_bound:.2%}"
    )


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
            "row_cpu_ms": found.row_cpu_ms,
            "stage_cpu_ms": found.stage_cpu_ms,
            "best_rows_per_second": best_rows_per_second(found.latency, found.typical_length),
            "threads": found.latency.threads,
            "peak_memory_bytes": found.peak_memory_bytes,
            "rows": found.quality.rows,
            "same_answers": 1 - found.quality.disagreement,
            "max_difference": found.quality.max_difference,
            "mean_cosine": found.quality.mean_cosine,
            "batch_invariant": found.batching.invariant,
            "changed_by_batching": found.batching.changed,
            "metric_name": found.quality.metric_name,
            "metric": found.quality.metric,
        }
        if found.quality.text is not None:
            row |= {
                "text": found.quality.text.model_dump(mode="json"),
                "prompt_token_cpu_ms": found.prompt_token_cpu_ms,
                "decode_token_cpu_ms": found.decode_token_cpu_ms,
            }
    return row


def print_table(family: Family, console: Console | None = None) -> None:
    console = console or Console()
    rows = [summary(variant) for variant in family.variants.values()]
    console.print(_table(family, rows))
    if family.manifest.points or family.manifest.levels:
        console.print()
        console.print(_points_table(family))
        console.print()
    for line in _footnotes(family):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    for dropped in family.manifest.dropped:
        shortened = Text(f"dropped: {dropped.id}: {dropped.reason}", style="dim")
        console.print(shortened, no_wrap=True, overflow="ellipsis", highlight=False)
    for item in family.manifest.not_built:
        console.print(f"not built: {item.id}: {item.reason}", highlight=False, soft_wrap=True, markup=False)


def _table(family: Family, rows: list[dict[str, Any]]) -> Table:
    metric = next((_figure(row)[0] for row in rows if _figure(row)[0]), None)
    title = f"{family.name}: {_task_in_words(family)}"
    # Narrow enough for 80 columns.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("variant", overflow="fold", min_width=12)
    table.add_column("runtime", no_wrap=True)
    speed = CPU_MS if _has_cpu_ms(rows) else "best\nrows/s"
    for column in ("MB", "ms at\nbatch 1", speed, "same\nanswers", "invariant", metric and metric.replace(" ", "\n")):
        if column is not None:
            table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for row in rows:
        is_default = row["id"] == family.manifest.default
        cells = _cells(row, "*" if is_default else "", metric, speed)
        table.add_row(*cells, style="bold" if is_default else None)
    return table


def _has_cpu_ms(rows: list[dict[str, Any]]) -> bool:
    return any(row.get("row_cpu_ms") is not None for row in rows)


def _points_table(family: Family) -> Table:
    """Each level with the point that may be served at it, or why there is none."""
    points = {point.id: point for point in family.manifest.points}
    table = Table(title="operating points", title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column in ("level", "bound", CPU_MS, "of the\noriginal"):
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    table.add_column("path, and the share of the rows\nthat each stage on it answers", overflow="fold")
    for level in sorted(family.manifest.levels, key=lambda level: level.alpha):
        point = points.pop(level.point or "", None)
        table.add_row(*(_refused(level) if point is None else _point_cells(level.alpha, point)))
    # Points that no level names.
    for point in points.values():
        table.add_row(*_point_cells(point.certificate.alpha, point))
    return table


def _point_cells(alpha: float, point: OperatingPoint) -> list[str | Text]:
    relative = relative_cost(point)
    return [
        f"{100 * alpha:g}%",
        f"{point.certificate.upper_bound:.2%}",
        "" if point.test is None else f"{point.test.cpu_ms_per_row:.2f}",
        "" if relative is None else f"{relative:.0%}",
        Text(path_in_brief(point)),
    ]


def _refused(level: Level) -> list[str | Text]:
    reason = level.reason or "no reason was recorded"
    needed = level.rows_needed
    if needed is not None and str(needed) not in reason:
        reason += f"; at least {needed:,} calibration rows are needed"
    return [f"{100 * level.alpha:g}%", "none", "", "", Text(reason)]


def _cells(row: dict[str, Any], mark: str, metric: str | None, speed: str) -> list[str]:
    cells = [row["id"] + mark, f"{row['runtime']} {row['precision']}", _megabytes(row["size_bytes"])]
    if not row["measured"]:
        return [*cells, "not measured"]
    cells += [
        f"{row['ms_at_batch_1']:.1f}",
        _milliseconds(row["row_cpu_ms"]) if speed == CPU_MS else f"{row['best_rows_per_second']:.0f}",
        f"{row['same_answers']:.2%}",
        "yes" if row["batch_invariant"] else f"no, {row['changed_by_batching']:.1%}",
    ]
    if metric is not None:
        figure = _figure(row)[1]
        cells.append("" if figure is None else f"{figure:.4f}")
    return cells


def _figure(row: dict[str, Any]) -> tuple[str | None, float | None]:
    """The last column's name and value: the task's metric, or the mean cosine to the reference's vectors."""
    if row.get("mean_cosine") is not None:
        return "mean cosine", row["mean_cosine"]
    return row.get("metric_name"), row.get("metric")


def _footnotes(family: Family) -> list[str]:
    reference = family.variant(family.manifest.reference).measured
    if reference is None:
        return []
    where = reference.hardware
    writes = family.manifest.task.kind is TaskKind.GENERATE
    return [
        *(["ms at batch 1: a token of one text alone. A row: a whole text, written beside others."] if writes else []),
        "* answers when a request names no variant. Invariant: no, and the share of answers that the batch changes.",
        f"{reference.quality.rows} test rows, {reference.typical_length} tokens at the median; another answer means: "
        f"{reference.quality.loss}.",
        f"{where.accelerator or where.processor}, {reference.latency.threads} of {where.cores} cores.",
    ]


def _task_in_words(family: Family) -> str:
    task = family.manifest.task
    if task.kind is TaskKind.GENERATE:
        return "texts"
    if task.head is None:
        return f"vectors of {task.width}"
    return f"{task.head.value.replace('_', ' ')}, {task.width} output" + "s" * (task.width > 1)


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size < 1e7 else f"{size / 1e6:.0f}"
