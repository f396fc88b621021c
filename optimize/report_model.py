"""What the report says about the model's inside and its answers: influence, importance, scores, labels, vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fettle.manifest import LabelDisagreement, ScoreCalibration, TaskKind
from optimize.report_facts import Facts, Tried
from optimize.report_html import (
    Column,
    Html,
    bar,
    details,
    fixed,
    join,
    paragraph,
    percent,
    table,
    tag,
    whole,
)
from optimize.report_plots import heat_map, reliability
from optimize.report_words import at_most, measured

Section = Html | None
LABELS_SHOWN = 30
VARIANTS_PER_LABEL = 4


def inside(facts: Facts) -> Section:
    found = facts.manifest.analysis
    parts: list[Html | None] = []
    if found.layer_influence:
        most = max(found.layer_influence) or 1.0
        rows = list(enumerate(found.layer_influence, start=1))
        layers = table(
            [
                Column("Layer", lambda row: str(row[0])),
                Column("Influence", lambda row: fixed(row[1], 3)),
                Column("", lambda row: bar(row[1] / most), figure=False),
            ],
            rows,
        )
        explained = "How much each layer changes what passes through it: 1 − cosine of its input and output."
        parts.append(tag("div", tag("h3", "Influence of the layers"), paragraph(explained), layers))
    if any(found.head_importance):
        explained = "First-order Taylor importance, in % of the largest. Pale heads can go first."
        drawn = tag("div", heat_map(found.head_importance, "layer", "head"))
        parts.append(tag("div", tag("h3", "Importance of the heads"), paragraph(explained), drawn))
    if any(found.neuron_importance):
        explained = "Mean importance by tenth of a layer’s feed-forward neurons, in % of the largest."
        drawn = tag("div", heat_map(found.neuron_importance, "layer", "decile"))
        parts.append(tag("div", tag("h3", "Importance of the neurons"), paragraph(explained), drawn))
    return tag("div", *parts, class_="inside") if parts else None


def scores(facts: Facts) -> Section:
    found = facts.manifest.analysis.scores
    if not found:
        return None
    figures = [
        tag("figure", reliability(item), tag("figcaption", _score_caption(item)), class_="small") for item in found
    ]
    columns: list[Column[tuple[ScoreCalibration, int]]] = [
        Column("Variant", lambda row: row[0].variant, figure=False),
        Column("Stage", lambda row: str(row[0].stage + 1)),
        Column("Score", lambda row: f"{row[0].bins[row[1]].low:.2f}–{row[0].bins[row[1]].high:.2f}"),
        Column("Rows", lambda row: whole(row[0].bins[row[1]].rows)),
        Column("Mean score", lambda row: fixed(row[0].bins[row[1]].mean_score, 3)),
        Column("Agree", lambda row: percent(row[0].bins[row[1]].agreed), "%"),
    ]
    bins = [(item, index) for item in found for index, one in enumerate(item.bins) if one.rows]
    return join(
        [
            paragraph(
                "When a stage gives an answer this score, how often does the original agree? Dots above the diagonal: "
                "the score is too modest; below: too sure. Bars show how many validation rows have each score."
            ),
            tag("div", *figures, class_="grid"),
            details("All bins as a table", table(columns, bins, cards=True)) if bins else None,
        ]
    )


def _score_caption(item: ScoreCalibration) -> str:
    rows = sum(one.rows for one in item.bins)
    return f"{item.variant}, stage {item.stage + 1}: {rows:,} rows, temperature {item.temperature:.2f}"


# Where answers differ.


def labels(facts: Facts) -> Section:
    found = facts.manifest.analysis.labels
    if not found or facts.manifest.task.kind is TaskKind.EMBED:
        return None
    names = _columns_of(facts, found)
    if not names:
        return None
    ordered = sorted(found, key=lambda row: -max((row.changed.get(name, 0.0) for name in names), default=0.0))
    most = max(row.changed.get(name, 0.0) for row in found for name in names) or 1.0
    columns: list[Column[LabelDisagreement]] = [
        Column("Label of the original", lambda row: row.label, figure=False),
        Column("Rows", lambda row: whole(row.rows), "test"),
        *(Column(_point_name(facts, name), partial(_changed, name), "%") for name in names),
        Column("", lambda row: bar(max(row.changed.get(name, 0.0) for name in names) / most), figure=False),
    ]
    rest = ordered[LABELS_SHOWN:]
    return join(
        [
            paragraph(
                "Share of the test rows with this label, as the original gives it, that get another answer; worst "
                "first. A promise over all rows is not one for each label, and a label with few rows says little."
            ),
            table(columns, ordered[:LABELS_SHOWN]),
            details(f"The other {len(rest):,} labels", table(columns, rest)) if rest else None,
        ]
    )


def _columns_of(facts: Facts, found: Sequence[LabelDisagreement]) -> list[str]:
    """The operating points; where there are none, the cheapest variants."""
    present = {name for row in found for name in row.changed}
    chosen = [point.id for point in facts.manifest.points if point.id in present]
    by_cost = sorted(facts.tried.values(), key=lambda item: item.cost or float("inf"))
    return chosen or [item.id for item in by_cost if item.id in present][:VARIANTS_PER_LABEL]


def _point_name(facts: Facts, name: str) -> str:
    point = next((point for point in facts.manifest.points if point.id == name), None)
    return name if point is None else ", ".join(at_most(alpha) for alpha in facts.levels_of(point))


def _changed(name: str, row: LabelDisagreement) -> str:
    return percent(row.changed.get(name), 1)


def vectors(facts: Facts) -> Section:
    if facts.manifest.task.kind is not TaskKind.EMBED:
        return None
    rows = [item for item in facts.tried.values() if item.manifest.measured is not None]
    columns: list[Column[Tried]] = [
        Column("Variant", lambda row: row.id, figure=False),
        Column("Mean cosine", measured(lambda found: fixed(found.quality.mean_cosine, 4))),
        Column("Below the floor", measured(lambda found: percent(found.quality.disagreement)), "% of rows"),
        Column("Top-10 overlap", lambda row: percent(_overlap(facts, row), 1), "%"),
    ]
    return join(
        [
            paragraph(
                f"A vector counts as different when its cosine with the original’s is below "
                f"{facts.manifest.cosine_floor:g}. Top-10 overlap: how many of a text’s ten nearest neighbours stay."
            ),
            table(columns, rows),
        ]
    )


def _overlap(facts: Facts, item: Tried) -> float | None:
    found = item.manifest.measured
    measured_here = None if found is None else found.quality.top10_overlap
    return facts.manifest.analysis.top10_overlap.get(item.id, measured_here)
