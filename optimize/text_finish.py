"""Operating points for text: certified on recorded generations, and tried on `test`.

What is certified is how greedy texts of the variants, from the engine that serves, answer beside the reference's
when they are stopped, accepted and passed on as the point says. Nothing is generated anew
for it: `fettle.text_trace` replays what the service would have done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fettle.config import OptimizeConfig
from fettle.drift import score_bins
from fettle.errors import PassError
from fettle.extract import Answer, FunctionAnswer
from fettle.findings import Gate, Level, OperatingPoint, Outcome, Step
from fettle.manifest import Analysis, Runtime, VariantManifest
from fettle.text_trace import replay_steps
from optimize import recipes, text_tracing
from optimize.finish import CERTIFY, MOST_CANDIDATES, TRY_POINTS, Findings, self_disagreement
from optimize.search import Tried
from optimize.text_build import TextBuilder
from optimize.text_certify import TextCandidate, TextProblem, certify_texts
from optimize.text_measure import metric_name, right_share
from optimize.text_tables import TokenCosts
from optimize.text_work import TextWork

SPLITS = ("validation", "calibration")
SMALLEST_MS = 1e-6


def find_text_points(work: TextWork, builder: TextBuilder, notes: Sequence[str]) -> Findings:
    """Search, certify and try operating points; without the splits for it, say for each level why there is none."""
    variants = builder.built
    findings = Findings(
        analysis=Analysis(notes=list(notes)), self_disagreement=self_disagreement(variants[recipes.REFERENCE])
    )
    missing = [name for name in SPLITS if not work.has(name)]
    if missing:
        return _refused(findings, work.config, f"the data have no {missing[0]} split; give --{missing[0]} or --data")
    reference = stand_in(variants)
    chosen, said = text_candidates(work, variants, reference)
    found = _candidates(work, chosen)
    if all(candidate.id != reference.id for candidate in found):
        return _refused(findings, work.config, "the reference could not be run")
    problem = TextProblem(
        reference=reference.id,
        candidates=found,
        extract=work.extract,
        self_changed=findings.self_disagreement.changed if findings.self_disagreement else 0.0,
        truth={
            "validation": builder.answers("validation"),
            "calibration": builder.answers("calibration"),
        },
        # The service imports no function of the user's.
        stops_at_answers=not isinstance(work.reference.task.answer, FunctionAnswer),
    )
    with work.progress.step(CERTIFY) as report:
        certified = certify_texts(problem, sorted(work.config.levels), work.config.delta, report=report)
    findings.levels = certified.levels
    findings.points = try_text_points(work, builder, certified.points, reference.id)
    findings.analysis = findings.analysis.model_copy(update={"notes": [*notes, *said, *certified.notes]})
    return findings


def stand_in(variants: Mapping[str, VariantManifest]) -> VariantManifest:
    """What points fall back on: the reference's weights on ONNX Runtime, or in torch where they have no graph."""
    return variants.get(recipes.ONNX_REFERENCE, variants[recipes.REFERENCE])


def text_candidates(
    work: TextWork, variants: Mapping[str, VariantManifest], reference: VariantManifest
) -> tuple[list[VariantManifest], list[str]]:
    """The stand-in and the most promising others, and what was left out, in words.

    A variant whose texts depend on who shares the batch could be certified in no batching for all others.
    """
    others = [variant for variant in variants.values() if variant.runtime is not Runtime.TORCH]
    others = [variant for variant in others if variant.id != reference.id]
    steady = [variant for variant in others if variant.measured is not None and variant.measured.batching.invariant]
    notes = [
        f"{variant.id} is part of no operating point, since its texts depend on who shares the batch"
        for variant in others
        if variant not in steady
    ]
    last = Tried.of(reference)

    def expected_ms(variant: VariantManifest) -> float:
        mine = Tried.of(variant)
        return mine.cpu_ms + min(1.0, 2 * mine.disagreement) * last.cpu_ms

    steady.sort(key=expected_ms)
    most = MOST_CANDIDATES[work.config.effort]
    return [reference, *steady[: most - 1]], notes


def try_text_points(
    work: TextWork, builder: TextBuilder, points: Sequence[OperatingPoint], reference: str
) -> list[OperatingPoint]:
    """The points with what `test` says of them."""
    if not points:
        return []
    answers, found = builder.answers("test"), []
    with work.progress.step(TRY_POINTS) as report:
        alone = _outcome(work, builder, (_to_its_end(reference),), answers)
        for number, point in enumerate(points):
            tried = _outcome(work, builder, point.steps, answers)
            costs = {"reference_cpu_ms_per_row": alone.cpu_ms_per_row}
            found.append(point.model_copy(update={"test": tried.model_copy(update=costs)}))
            report((number + 1) / len(points))
    return found


def costs_of(variant: VariantManifest) -> TokenCosts:
    """What its tokens cost, as measured in full slots."""
    found = variant.measured
    assert found is not None
    assert found.prompt_token_cpu_ms is not None
    assert found.decode_token_cpu_ms is not None
    return TokenCosts(prompt_ms=found.prompt_token_cpu_ms, decode_ms=found.decode_token_cpu_ms)


def _outcome(work: TextWork, builder: TextBuilder, steps: Sequence[Step], answers: Sequence[Answer]) -> Outcome:
    """The rows of `test` through these steps, from their traces. The reference's cost is yet to be filled in."""
    variants = [builder.built[step.variant] for step in steps]
    traces = [text_tracing.trace(work, variant, "test") for variant in variants]
    costs = [costs_of(variant) for variant in variants]
    rows = [replay_steps(row, steps, work.extract) for row in zip(*traces, strict=True)]
    last = [attempts[-1] for attempts in rows]
    wrong = np.array([one.answer != truth for one, truth in zip(last, answers, strict=True)])
    spent = [
        sum(
            cost.prompt_ms * trace.prompt + cost.decode_ms * max(0, attempt.drawn - 1)
            for cost, trace, attempt in zip(costs, own, attempts, strict=False)
        )
        for attempts, own in zip(rows, zip(*traces, strict=True), strict=True)
    ]
    taken = np.array([len(attempts) - 1 for attempts in rows])
    right = work.right_answers("test")
    answer = work.reference.task.answer
    assert answer is not None
    mean = max(float(np.mean(spent)), SMALLEST_MS)
    return Outcome(
        rows=len(rows),
        errors=int(wrong.sum()),
        disagreement=float(wrong.mean()),
        answered=[[float((taken == number).mean())] for number in range(len(steps))],
        cpu_ms_per_row=mean,
        reference_cpu_ms_per_row=mean,
        metric_name=None if right is None else metric_name(answer),
        metric=right_share([one.text for one in last], right, work.extract),
        scores=score_bins([one.score for one in last]) if any(step.text for step in steps) else [],
    )


def _candidates(work: TextWork, variants: Sequence[VariantManifest]) -> list[TextCandidate]:
    """With their traces; one that fails is left out and said."""
    found = []
    for variant in variants:
        try:
            traces = {split: text_tracing.trace(work, variant, split) for split in SPLITS}
        except PassError as error:
            work.progress.warn(f"{variant.id} is left out of the operating points: {error.message}")
        else:
            found.append(TextCandidate(variant.id, costs_of(variant), **traces))
    return found


def _refused(findings: Findings, config: OptimizeConfig, reason: str) -> Findings:
    findings.levels = [Level(alpha=alpha, reason=reason) for alpha in sorted(config.levels)]
    return findings


def _to_its_end(variant: str) -> Step:
    return Step(variant=variant, gates=[Gate(threshold=0.0)])
