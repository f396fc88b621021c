"""The parts of the report that say what happened and how: what is missing and why, the data, the machine, the words."""

from __future__ import annotations

from fettle.manifest import DataSplit, Measurements
from optimize.report_facts import Facts
from optimize.report_html import (
    Column,
    Html,
    join,
    listing,
    paragraph,
    percent_of,
    table,
    tag,
    whole,
)

Section = Html | None
HASH_SHOWN = 12
PURPOSE = {
    "train": "students and exit heads learn from it",
    "validation": "thresholds are chosen on it",
    "calibration": "the certificates are tested on it, once",
    "test": "quality and the operating points’ costs are reported on it",
}
GLOSSARY = {
    "original, reference": "The model as it was given. All other variants are compared with its answers.",
    "variant": "One servable model made from the original by a recipe.",
    "disagreement": "The share of rows that get another answer than the original gives.",
    "stage, exit": "Some variants can answer after a part of their layers. Each such place is a stage.",
    "score": "How sure a stage is of its answer, from 0 to 1: the lead of its first answer over the second.",
    "operating point": "A path of variants with the scores from which each stage answers.",
    "level": "The largest disagreement that a request tolerates.",
    "certified bound": "What the disagreement does not exceed, at the stated confidence, if traffic resembles the "
    "calibration rows: the Clopper-Pearson bound of the errors seen there.",
    "p-value": "The chance of so few errors if the true disagreement were at the level.",
    "batch-invariant": "An answer does not depend on the rows that share its batch.",
    "processor time": "Seconds of work of all threads together, which is what a busy server pays for.",
}


def missing(facts: Facts) -> Section:
    """What was not built, and what was built and left out."""
    rows = [(item.id, "not built", item.reason) for item in facts.manifest.not_built]
    rows += [(item.id, "dropped", item.reason) for item in facts.manifest.dropped]
    if not rows:
        return None
    columns: list[Column[tuple[str, str, str]]] = [
        Column("Variant", lambda row: row[0], figure=False),
        Column("What", lambda row: row[1], figure=False),
        Column("Why", lambda row: tag("span", row[2], class_="prose"), figure=False),
    ]
    return table(columns, rows, cards=True)


def search(facts: Facts) -> Section:
    notes = facts.manifest.analysis.notes
    return listing(notes, "ol") if notes else None


def data(facts: Facts) -> Section:
    order = list(PURPOSE)
    rows = sorted(facts.manifest.data.items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order))
    columns: list[Column[tuple[str, DataSplit]]] = [
        Column("Split", lambda row: row[0], figure=False),
        Column("Rows", lambda row: whole(row[1].rows)),
        Column("Labels", lambda row: "yes" if row[1].labelled else "no", figure=False),
        Column("Used for", lambda row: tag("span", PURPOSE.get(row[0], ""), class_="prose"), figure=False),
        Column("Fingerprint", lambda row: _hash(row[1].sha256), "SHA-256", figure=False),
    ]
    return join([table(columns, rows, cards=True), _self_disagreement(facts)]) if rows else None


def method(facts: Facts) -> Section:
    """How and where it was measured."""
    found = facts.tried[facts.manifest.reference].manifest.measured
    machine = facts.manifest.hardware
    memory = f"{machine.memory_bytes / 2**30:.0f} GiB of memory"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine.versions.items()))
    terms = {
        "Machine": ", ".join(filter(None, [machine.processor, f"{machine.cores} cores", memory, machine.accelerator])),
        "Libraries": ", ".join(filter(None, [f"fettle {facts.manifest.fettle_version}", versions])),
        "Model": f"{facts.manifest.source.name} ({facts.manifest.source.architecture})",
        "Model’s fingerprint": _hash(facts.manifest.source.sha256),
    }
    return join(
        [
            _measuring(facts, found) if found is not None else None,
            _definitions(terms),
            _elsewhere(facts),
            tag("h3", "Words used here"),
            _definitions(GLOSSARY),
        ]
    )


def command(facts: Facts) -> Section:
    if not facts.manifest.command:
        return None
    said = paragraph("The same command on the same files makes this family again; what is there already is reused.")
    return join([tag("pre", tag("code", facts.manifest.command)), said])


def _measuring(facts: Facts, found: Measurements) -> Html:
    threads = f"{found.latency.threads} thread" + "s" * (found.latency.threads > 1)
    if found.quality.text is not None:
        return _writing(facts, found, threads)
    return paragraph(
        f"Every variant ran alone in a process of its own, on the engine that serves it, with {threads}, over "
        f"{found.quality.rows:,} test rows (median {found.typical_length} tokens): alone, and in mixed batches of "
        f"{found.batching.batch}; the worse of the two counts. Counted as another answer: {found.quality.loss}. "
        f"Costs are {facts.cost_name} for a row on average, in the batch size that suits the variant best; an "
        "operating point and the original beside it were measured in one run. Memory is the peak of the variant’s "
        "process. Figures from other hardware would be different."
    )


def _writing(facts: Facts, found: Measurements, threads: str) -> Html:
    return paragraph(
        f"Every variant ran alone in a process of its own, on the engine that serves it, with {threads}: greedy texts "
        f"of {found.quality.rows:,} test rows (median {found.typical_length} tokens, prompt and half of the text) in "
        f"{found.batching.batch} slots, each refilled as soon as a text ends, and the first {found.batching.rows:,} "
        f"again one by one. Counted as another answer: {found.quality.loss}, beside the texts that the original writes "
        f"in torch and float32. Costs are {facts.cost_name} for a whole text on average, in full slots; those of an "
        "operating point follow from the tokens that it reads and writes. Memory is the peak of the variant’s process, "
        "keys and values included. Figures from other hardware would be different."
    )


def _self_disagreement(facts: Facts) -> Html | None:
    found = facts.manifest.self_disagreement
    if found is None:
        return None
    limit = " No level below that can be promised." if found.changed > 0 else ""
    return paragraph(
        f"The original against itself, alone and in mixed batches: {percent_of(found.changed)} of {found.rows:,} rows "
        f"change their answer (largest difference of an output {found.max_difference:.2g}).{limit}"
    )


def _elsewhere(facts: Facts) -> Html | None:
    """Variants that were measured on another machine or with other versions than the family's own."""
    others = [
        item.id
        for item in facts.tried.values()
        if item.manifest.measured is not None and item.manifest.measured.hardware != facts.manifest.hardware
    ]
    return paragraph("Measured on other hardware or versions: " + ", ".join(others) + ".") if others else None


def _definitions(terms: dict[str, str] | dict[str, Html] | dict[str, str | Html]) -> Html:
    return tag("dl", *(tag("div", tag("dt", term), tag("dd", said)) for term, said in terms.items()))


def _hash(sha256: str) -> Html:
    return tag("code", sha256[:HASH_SHOWN], title=sha256)
