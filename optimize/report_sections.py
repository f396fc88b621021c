"""The report's comparisons: operating points, the frontier, the levers. Each returns a section's content, or None."""

from __future__ import annotations

from fettle.manifest import Certificate, Gate, Level, Measurements, OperatingPoint, Tested
from optimize.report_facts import Facts, Lever, Tried
from optimize.report_html import (
    Column,
    Html,
    details,
    fixed,
    join,
    listing,
    megabytes,
    paragraph,
    percent,
    percent_of,
    table,
    tag,
    times,
)
from optimize.report_plots import Frontier, levers_shown, marks_of
from optimize.report_remarks import remarks
from optimize.report_words import (
    at_most,
    found_by,
    measured,
    pass_in_words,
    path_in_words,
    recipe_in_brief,
    refusals,
    relative_cost,
    runtime_in_words,
    stages_in_words,
)

Section = Html | None
WIDE, NARROW = (1040.0, 560.0), (344.0, 460.0)
RULE_OF_THREE = 3.0
LEVER_TITLES = {
    Lever.REFERENCE: "The original",
    Lever.EXITS: "Exits: easy rows leave after fewer layers",
    Lever.QUANTIZED: "Quantization: fewer bits per number",
    Lever.RESHAPED: "Reshaping: another architecture, then trained to follow the original",
    Lever.PRUNED: "Pruning: parts that matter little are taken away",
    Lever.DISTILLED: "Distillation: a smaller model trained to follow the original",
    Lever.HARDWARE: "Hardware: the same weights on a faster runtime",
}


# Operating points.


def points(facts: Facts) -> Section:
    levels, known = facts.manifest.levels, {level.point for level in facts.manifest.levels}
    served = [(level.alpha, point) for level in levels if (point := facts.point(level)) is not None]
    served += [(point.certificate.alpha, point) for point in facts.manifest.points if point.id not in known]
    refused = refusals(levels)
    if not served and not refused:
        return None
    return join(
        [
            paragraph(
                "An operating point sends each row along a path of variants; a row is answered at the first stage that "
                "is sure enough. The bound is what the exact test on the calibration rows allows to promise; the test "
                "rows were not used for it."
            ),
            table(_point_columns(facts), sorted(served, key=lambda pair: pair[0]), cards=True) if served else None,
            listing((join([tag("strong", "Refused. "), line]) for line in refused), class_="plain"),
            *(_thresholds(point) for point in facts.manifest.points if point.id not in known),
            *(_how_certified(level, facts.point(level)) for level in levels),
        ]
    )


def _point_columns(facts: Facts) -> list[Column[tuple[float, OperatingPoint]]]:
    metric = next((point.test.metric_name for point in facts.manifest.points if point.test), None)
    columns: list[Column[tuple[float, OperatingPoint]]] = [
        Column("Level", lambda row: at_most(row[0])),
        Column("Certified bound", lambda row: percent(row[1].certificate.upper_bound), "%"),
        Column("Errors / rows", lambda row: _evidence(row[1].certificate), "calibration"),
        Column("Path", lambda row: tag("span", path_in_words(row[1]), class_="prose"), figure=False),
        Column("Cost", lambda row: fixed(row[1].test.cpu_ms_per_row if row[1].test else None), "CPU ms per row"),
        Column("Of the original", lambda row: percent(relative_cost(row[1]), 0), "%, fp32 on ONNX"),
        Column("Differs on test", lambda row: percent(row[1].test.disagreement if row[1].test else None), "%"),
    ]
    if metric is not None:
        columns.append(Column(metric.capitalize(), lambda row: fixed(row[1].test.metric if row[1].test else None, 4)))
    return columns


def _thresholds(point: OperatingPoint) -> Html:
    gates = [(step.variant, number, gate) for step in point.steps for number, gate in enumerate(step.gates, start=1)]
    columns: list[Column[tuple[str, int, Gate]]] = [
        Column("Variant", lambda row: row[0], figure=False),
        Column("Stage", lambda row: str(row[1])),
        Column("Answers from a score of", lambda row: _threshold(row[2].threshold, row is gates[-1])),
        Column("Temperature", lambda row: fixed(row[2].temperature)),
    ]
    covered = f"Thresholds of {point.id}, certified for these batchings: {point.certificate.batchings}."
    return join([paragraph(covered), table(columns, gates, cards=True)])


def _how_certified(level: Level, point: OperatingPoint | None) -> Html | None:
    """The thresholds of a level's point, and every test on the way to it; folded away."""
    tests = _tests(level) if level.path else None
    if tests is None and point is None:
        return None
    outcome = "was certified" if point is not None else "was refused"
    thresholds = [_thresholds(point)] if point is not None else []
    return details(f"How {percent_of(level.alpha)} {outcome}", *thresholds, tests)


def _threshold(value: float, last: bool) -> str:
    return "any" if last or value <= 0 else "never" if value > 1 else f"{value:.3f}"


def _tests(level: Level) -> Html:
    columns: list[Column[Tested]] = [
        Column("Test", lambda row: row.label, figure=False),
        Column("Expected cost", lambda row: fixed(row.expected_cpu_ms), "CPU ms per row"),
        Column("Differs on validation", lambda row: percent(row.tuned_disagreement), "%"),
        Column("Errors / rows", lambda row: _errors(row.certificate.errors, row.certificate.rows), "calibration"),
        Column("p-value", lambda row: f"{row.certificate.p_value:.2g}"),
        Column("Passed", _passed, figure=False),
    ]
    order = "The tests, from cautious to bold in an order fixed beforehand; the first failure ends the sequence."
    return join([paragraph(order), table(columns, level.path, cards=True)])


def _passed(row: Tested) -> str:
    return "✓ yes" if row.certificate.p_value <= row.certificate.delta else "✗ no"


def _evidence(certificate: Certificate) -> str:
    """Says so where the rows are not those of the split that the column is about."""
    counted = _errors(certificate.errors, certificate.rows)
    return counted if certificate.source == "calibration" else f"{counted} of {certificate.source}"


def _errors(errors: int, rows: int) -> str:
    return f"{errors:,} / {rows:,}"


# The frontier.


def frontier(facts: Facts) -> Section:
    marks = marks_of(facts)
    if len(marks) < 2:
        return None
    shown = levers_shown(marks)
    rows = max(found.quality.rows for found in facts.measurements)
    legend = [join([tag("i", class_=f"key {lever.value}"), lever.value]) for lever in shown]
    if facts.manifest.points:
        legend.append(join([tag("i", class_="key point"), "operating point"]))
    if any(mark.faint for mark in marks):
        legend.append(join([tag("i", class_="key faint"), "faint: dropped"]))
    return tag(
        "figure",
        listing(legend, class_="legend"),
        *(
            _drawing(Frontier(facts, marks, *size), name)
            for size, name in ((WIDE, "wide-only"), (NARROW, "narrow-only"))
        ),
        tag("output", "Point at a mark, tap it or reach it with the Tab key to read its recipe.", class_="tip"),
        tag("figcaption", _frontier_caption(facts, rows)),
    )


def _drawing(plot: Frontier, class_: str) -> Html:
    svg = plot.svg()
    numbered = [f"{mark.name}: {mark.cost:.2f} ms, {percent_of(mark.share)}" for mark in plot.numbered]
    return tag("div", svg, listing(numbered, "ol", "numbers"), class_=class_)


def _frontier_caption(facts: Facts, rows: int) -> str:
    text = (
        f"Left is cheaper ({facts.cost_name}), down is more faithful. Both axes are logarithmic; marks on the lowest "
        f"line, below the break, differed on none of the {rows:,} test rows, which does not rule out up to "
        f"{percent_of(RULE_OF_THREE / rows)}. The dashed line joins the variants that no other single variant beats."
    )
    if facts.manifest.points:
        text += " A diamond’s whisker ends at its certified bound."
    return text


# Levers.


def levers(facts: Facts) -> Section:
    groups = [(lever, [item for item in facts.tried.values() if item.lever is lever]) for lever in Lever]
    columns = _lever_columns(facts)
    parts: list[Html | None] = [
        paragraph(
            f"“Times faster” compares {facts.cost_name} with {facts.baseline.id}, the original in float32 on ONNX "
            "Runtime, and with the variant that it was made from."
            if facts.baseline.lever is Lever.HARDWARE
            else f"“Times faster” compares {facts.cost_name} with {facts.baseline.id}, the original."
        )
    ]
    for lever, items in groups:
        if items:
            parts.append(tag("h3", tag("i", class_=f"key {lever.value}"), LEVER_TITLES[lever]))
            parts.append(table(columns, items, cards=True, row_class=lambda row: "faint" if row.dropped else None))
            parts.append(listing(remarks(facts, lever), class_="remarks"))
    return join(parts)


def _lever_columns(facts: Facts) -> list[Column[Tried]]:
    reference = facts.tried[facts.manifest.reference].manifest.size_bytes or 1
    metric = next((found.quality.metric_name for found in facts.measurements if found.quality.metric_name), None)
    columns: list[Column[Tried]] = [
        Column("Variant", _variant_cell, figure=False),
        Column("Size", lambda row: megabytes(row.manifest.size_bytes), "MB"),
        Column("Size", lambda row: percent(row.manifest.size_bytes / reference, 0), "% of the original"),
        Column("Cost", lambda row: fixed(row.cost), facts.cost_unit),
        Column("Faster", lambda row: times(facts.speed_up(row)), f"than {facts.baseline.id}"),
        Column("Faster", lambda row: times(facts.speed_up_over_parent(row)), "than its parent"),
        Column("Same answers", measured(lambda found: percent(1 - found.quality.disagreement)), "%"),
        Column("Batch-invariant", measured(_invariance), "or % changed"),
    ]
    if metric is not None:
        columns.append(Column(metric.capitalize(), measured(lambda found: fixed(found.quality.metric, 4))))
    columns.append(Column("Memory", measured(lambda found: megabytes(found.peak_memory_bytes)), "MB"))
    columns.append(Column("Made in", lambda row: fixed(row.build_seconds, 0 if row.build_seconds >= 10 else 1), "s"))
    return columns


def _variant_cell(item: Tried) -> Html:
    made = f"from {item.manifest.parent}: " if item.manifest.parent else ""
    stages = stages_in_words(item)
    return join(
        [
            tag("b", item.id),
            tag("span", f"{made}{recipe_in_brief(item)}; {runtime_in_words(item)}", class_="how"),
            tag("span", stages, class_="how found") if stages else None,
            tag("span", f"Dropped: {item.dropped}", class_="how") if item.dropped else None,
            _passes(item),
        ]
    )


def _passes(item: Tried) -> Html | None:
    """Folded: every pass with its parameters, how long it took and what it found."""
    lines = []
    for record in item.manifest.recipe:
        found = found_by(record)
        seconds = fixed(record.seconds, 0 if record.seconds >= 10 else 1)
        lines.append(f"{pass_in_words(record)}, {seconds} s" + (f". Found: {found}" if found else ""))
    return tag("details", tag("summary", "every pass"), listing(lines), class_="passes") if lines else None


def _invariance(found: Measurements) -> str:
    return "yes" if found.batching.invariant else f"no, {percent(found.batching.changed)}"
