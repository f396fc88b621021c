"""The report's sentences: what came out, what was done to a variant, which way a row goes, what is worth noting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import JsonValue

from fettle.extract import loss_in_words
from fettle.manifest import Level, Measurements, OperatingPoint, PassRecord, Runtime, TaskKind
from optimize.report_facts import Facts, Lever, Tried, lever_of_pass
from optimize.report_html import ABSENT, fixed, percent_of, times, whole

DONE = {
    Lever.EXITS: "given exits",
    Lever.QUANTIZED: "quantized",
    Lever.RESHAPED: "reshaped",
    Lever.PRUNED: "pruned",
    Lever.DISTILLED: "distilled",
}
DONE_BY_NAME = {
    "alternate-layers": "every other layer kept",
    "checkpoint": "saved as a checkpoint",
    "drop-layers": "layers dropped",
    "export": "exported to ONNX",
    "exit-heads": "exit heads trained",
    "export-stages": "exported to ONNX in stages",
    "factorize": "embeddings factorized",
    "factorize-embeddings": "embeddings factorized",
    "first-token": "last layer computed for the first token alone",
    "fuse": "operators fused",
    "keep-alternate-layers": "every other layer kept",
    "prune-heads-and-neurons": "least important heads and neurons removed",
    "prune-layers": "least influential layers removed",
    "quantize-embeddings": "embeddings quantized",
    "reshape-heads": "heads of keys and values merged",
    "share": "layers made to share weights",
    "share-layers": "layers made to share weights",
    "shrink-width": "made narrower",
    "split": "cut into stages",
    "width": "made narrower",
}
SCHEMES = {
    "dynamic": "one scale for all tokens of a call",
    "rows": "known ranges, or a scale for each token",
    "static": "known ranges",
    "weights4": "weights alone, to 4 bits",
    "weights8": "weights alone, to 8 bits",
}
LONGEST_VALUE = 80
NOTHING_GAINED = 0.95


def task_in_words(facts: Facts) -> str:
    task = facts.manifest.task
    if task.kind is TaskKind.GENERATE:
        return "texts" if task.answer is None else f"texts; another answer is {loss_in_words(task.answer)}"
    if task.kind is TaskKind.EMBED:
        return f"embeddings of {task.width} numbers"
    head = task.head.value.replace("_", "-") if task.head is not None else "classification"
    return f"{head} classification, {task.width} labels" if task.width > 1 else f"{head}, one number"


def result(facts: Facts) -> str:
    """The outcome in one sentence, or why there is none."""
    point = facts.best_point
    if point is None:
        return nothing_certified(facts)
    bound = percent_of(facts.levels_of(point)[0])
    confidence = percent_of(1 - point.certificate.delta)
    promise = f"with {confidence} confidence no more than {bound} of the answers differ from the original’s"
    ratio = relative_cost(point)
    if ratio is None:
        return f"Certified: {promise}. What it costs was not measured on test rows."
    if ratio > NOTHING_GAINED:
        return (
            f"Certified, but nothing is saved: {promise}, at {percent_of(ratio)} of the original’s "
            "processor time (float32 on ONNX Runtime)."
        )
    return (
        f"Answers within {bound} of the original cost {percent_of(ratio)} of its processor time ({times(1 / ratio)} "
        f"less), certified with {confidence} confidence."
    )


def evidence(facts: Facts) -> str | None:
    """What stands behind the result: the test rows' figures of the same point."""
    point = facts.best_point
    if point is None or point.test is None:
        return None
    found, certificate = point.test, point.certificate
    text = (
        f"A row costs {fixed(found.cpu_ms_per_row)} instead of {fixed(found.reference_cpu_ms_per_row)} CPU ms. "
        f"{certificate.errors:,} of {certificate.rows:,} {certificate.source} rows got another answer than the "
        f"original gives, and {percent_of(found.disagreement)} of {found.rows:,} test rows that nothing was tuned on"
    )
    original = next((item.quality.reference_metric for item in facts.measurements), None)
    if found.metric is None or original is None:
        return f"{text}."
    return f"{text}; {found.metric_name} {fixed(found.metric, 4)}, the original’s {fixed(original, 4)}."


def nothing_certified(facts: Facts) -> str:
    levels = facts.manifest.levels
    if not levels:
        return "Nothing is certified: no operating point was searched for, so only the single variants are compared."
    return " ".join(
        [f"Nothing is certified, so {facts.manifest.default} answers what names no other variant.", *refusals(levels)]
    )


def refusals(levels: Sequence[Level]) -> list[str]:
    """Why levels have no operating point, as sentences; those with one reason share one."""
    alike: dict[str, list[str]] = {}
    for level in levels:
        if level.point is None:
            alike.setdefault(_refusal(level), []).append(percent_of(level.alpha))
    return [f"At {', '.join(alphas)}: {reason}." for reason, alphas in alike.items()]


def _refusal(level: Level) -> str:
    reason = (level.reason or "no reason was recorded").rstrip(".")
    needed = level.rows_needed
    if needed is None or str(needed) in reason or whole(needed) in reason:
        return reason
    return f"{reason}; at least {whole(needed)} calibration rows are needed"


def relative_cost(point: OperatingPoint) -> float | None:
    """Measured on test, as a share of the original's cost in the same run."""
    return None if point.test is None else point.test.cpu_ms_per_row / point.test.reference_cpu_ms_per_row


def path_in_words(point: OperatingPoint) -> str:
    """Which variant and stage answers how much: shares of the test rows, or thresholds where they are not known."""
    parts = []
    for index, step in enumerate(point.steps):
        shares = point.test.answered[index] if point.test is not None and index < len(point.test.answered) else []
        last = index == len(point.steps) - 1
        stages = [
            _stage_in_words(stage, len(step.gates), shares, step.gates[stage].threshold, last)
            for stage in range(len(step.gates))
        ]
        parts.append(f"{step.variant} " + ", ".join(stage for stage in stages if stage))
    return "; then ".join(parts)


def at_most(share: float) -> str:
    return f"≤\u00a0{percent_of(share)}"


def _stage_in_words(stage: int, stages: int, shares: Sequence[float], threshold: float, last: bool) -> str:
    name = f"stage {stage + 1} " if stages > 1 else ""
    if stage < len(shares):
        return f"{name}answers {percent_of(shares[stage])}" if shares[stage] > 0 else ""
    if last and stage == stages - 1:
        return f"{name}answers the rest"
    return f"{name}from a score of {threshold:.2f}" if threshold <= 1 else ""


# What was done to a variant.


def recipe_in_words(tried: Tried) -> str:
    """Its own passes; what its parent had done to it is not repeated."""
    return "; ".join(pass_in_words(record) for record in tried.manifest.recipe) or "as it was given"


def recipe_in_brief(tried: Tried) -> str:
    """The same without parameters but the scheme of a quantization, each kind of pass once."""
    return "; ".join(dict.fromkeys(map(_briefly, tried.manifest.recipe))) or "as it was given"


def pass_in_words(record: PassRecord) -> str:
    given = ", ".join(_value_in_words(key, value) for key, value in record.parameters.items() if value is not None)
    return f"{_done(record)} ({given})" if given else _done(record)


def found_by(record: PassRecord) -> str:
    """What a pass noted, e.g. how many nodes were fused."""
    return ", ".join(_value_in_words(key, value) for key, value in record.notes.items() if value is not None)


def _briefly(record: PassRecord) -> str:
    scheme = record.parameters.get("scheme")
    return f"{_done(record)}, {SCHEMES.get(scheme, scheme)}" if isinstance(scheme, str) else _done(record)


def _done(record: PassRecord) -> str:
    lever = lever_of_pass(record)
    return DONE_BY_NAME.get(record.name) or (DONE[lever] if lever is not None else record.name)


def stages_in_words(tried: Tried) -> str:
    """What each stage costs, where there are several."""
    found = tried.manifest.measured
    if found is None or len(found.stage_cpu_ms) < 2:
        return ""
    return f"Stages cost {', '.join(fixed(cost) for cost in found.stage_cpu_ms)} CPU ms per row"


def runtime_in_words(tried: Tried) -> str:
    runtime = {Runtime.ONNX: "ONNX Runtime", Runtime.TORCH: "torch"}.get(tried.manifest.runtime, "a fake engine")
    return f"runs on {runtime} in {tried.manifest.precision.value}"


def _value_in_words(key: str, value: JsonValue) -> str:
    name = key.replace("_", " ")
    match value:
        case True:
            return name
        case False:
            return f"not {name}"
        case float():
            return f"{name} {value:.4g}"
        case list():
            return _shortened(f"{name} {', '.join(_plain(item) for item in value)}")
        case dict():
            return _shortened(f"{name} {', '.join(f'{key} {_plain(item)}' for key, item in value.items())}")
        case _:
            return _shortened(f"{name} {value}")


def _plain(value: JsonValue) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def measured(cell: Callable[[Measurements], str]) -> Callable[[Tried], str]:
    """A table cell over a variant's measurements; a dash where it has none."""

    def shown(item: Tried) -> str:
        return ABSENT if item.manifest.measured is None else cell(item.manifest.measured)

    return shown
