"""What the report says about text: how the variants write beside the original, how fast, and what stops the points."""

from __future__ import annotations

from collections.abc import Callable

from fettle.latency import estimate_ms
from fettle.manifest import LatencyTable, Measurements, OperatingPoint, TaskKind, TextFigures, TextQuality, VotePoint
from optimize.report_facts import Facts, Tried
from optimize.report_html import (
    ABSENT,
    Column,
    Html,
    fixed,
    join,
    listing,
    paragraph,
    percent,
    table,
    tag,
    whole,
)
from optimize.report_words import at_most, measured
from optimize.text_certify import text_in_words

Section = Html | None


def texts(facts: Facts) -> Section:
    if facts.manifest.task.kind is not TaskKind.GENERATE:
        return None
    rows = [item for item in facts.tried.values() if _quality(item) is not None]
    if not rows:
        return None
    longest = max(quality.max_tokens for item in rows if (quality := _quality(item)) is not None)
    return join(
        [
            paragraph(
                f"Greedy texts of at most {longest} tokens, beside the original’s on the same test rows. Perplexity is "
                "that of the rows’ own prompts and answers. A text that differs may still hold the same answer."
            ),
            table(_writing(), rows, cards=True),
            tag("h3", "How fast they write"),
            paragraph("A step gives each text that is under way one token; so many texts share it."),
            table(_speeds(rows), rows, cards=True),
            *_points(facts),
            *_votes(facts),
        ]
    )


def _writing() -> list[Column[Tried]]:
    return [
        Column("Variant", lambda row: row.id, figure=False),
        Column("Same answers", measured(lambda found: percent(1 - found.quality.disagreement)), "%"),
        Column("Identical texts", _shown(lambda found: percent(found.identical_texts)), "%"),
        Column("Tokens before a difference", _shown(lambda found: percent(found.token_agreement)), "%"),
        Column("Perplexity", _shown(lambda found: fixed(found.perplexity, 3))),
        Column("Tokens", _shown(lambda found: fixed(found.tokens, 1)), "a text"),
    ]


def _speeds(rows: list[Tried]) -> list[Column[Tried]]:
    batches = sorted({cell.batch for item in rows for cell in _measured(item).latency.cells})
    columns: list[Column[Tried]] = [Column("Variant", lambda row: row.id, figure=False)]
    for batch in batches:
        columns.append(Column(f"Step of {batch}", measured(_step_of(batch)), "ms"))
    return [
        *columns,
        Column("Writes", measured(lambda found: whole(_best(found.latency, found.typical_length))), "tokens/s at most"),
        Column("Reads", measured(lambda found: whole(_reads(found))), "tokens/s of a prompt"),
        Column("Read", measured(lambda found: fixed(found.prompt_token_cpu_ms, 3)), "CPU ms a token"),
        Column("Written", measured(lambda found: fixed(found.decode_token_cpu_ms, 3)), "CPU ms a token"),
    ]


def _points(facts: Facts) -> list[Html | None]:
    points = [point for point in facts.manifest.points if point.text is not None]
    if not points:
        return []
    columns: list[Column[OperatingPoint]] = [
        Column("Point", lambda row: at_most(row.certificate.alpha)),
        Column("Tokens", _drawn(lambda found: fixed(sum(found.tokens))), "a request"),
        Column("The original’s", _drawn(lambda found: fixed(found.reference_tokens)), "a request"),
        Column("Go on", _drawn(lambda found: percent(found.reached[-1] if len(found.reached) > 1 else 0.0, 1)), "%"),
        Column("Given up early", _drawn(lambda found: percent(found.given_up, 1)), "%"),
    ]
    said = [f"{point.id}: {text_in_words(point.steps)}" for point in points]
    explained = (
        "What the points write, on validation rows: a text ends where its answer is sure, and an attempt that will not "
        "be accepted is given up. Below, what each stops at: how probable the answer is, or an end instead of the next "
        "token; and the score from which an attempt is accepted."
    )
    return [tag("h3", "Stopping early"), paragraph(explained), table(columns, points, cards=True), listing(said)]


def _votes(facts: Facts) -> list[Html | None]:
    votes = facts.manifest.votes
    if not votes:
        return []
    columns: list[Column[VotePoint]] = [
        Column("Vote", lambda row: "lossless" if row.certificate is None else at_most(row.certificate.alpha)),
        Column("Certified", lambda row: ABSENT if row.certificate is None else percent(row.certificate.upper_bound)),
        Column("Drawn", lambda row: fixed(row.drawn, 1), f"of {votes[0].choices}"),
        Column("Ends at", lambda row: ABSENT if row.confidence is None else f"{row.confidence:g}"),
    ]
    explained = (
        f"One answer, that which most of {votes[0].choices} sampled at temperature {votes[0].temperature:g} agree on. "
        "The lossless vote ends when what is left to draw cannot change the winner; the others when the leader is as "
        "sure as said, which on calibration rows changed the winner as seldom as certified."
    )
    return [tag("h3", "Votes"), paragraph(explained), table(columns, votes, cards=True)]


def _quality(item: Tried) -> TextQuality | None:
    return None if item.manifest.measured is None else item.manifest.measured.quality.text


def _measured(item: Tried) -> Measurements:
    assert item.manifest.measured is not None
    return item.manifest.measured


def _shown(cell: Callable[[TextQuality], str]) -> Callable[[Tried], str]:
    def shown(item: Tried) -> str:
        quality = _quality(item)
        return ABSENT if quality is None else cell(quality)

    return shown


def _drawn(cell: Callable[[TextFigures], str]) -> Callable[[OperatingPoint], str]:
    return lambda point: ABSENT if point.text is None else cell(point.text)


def _step_of(batch: int) -> Callable[[Measurements], str]:
    return lambda found: fixed(estimate_ms(found.latency, batch, found.typical_length))


def _best(steps: LatencyTable, length: int) -> float:
    return max(1000 * batch / estimate_ms(steps, batch, length) for batch in {cell.batch for cell in steps.cells})


def _reads(found: Measurements) -> float | None:
    if found.prompts is None:
        return None
    return max(1000 * cell.length / cell.median_ms for cell in found.prompts.cells)
