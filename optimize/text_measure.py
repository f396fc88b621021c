"""Measure a text generator on the engine that will serve it: what it answers, how it is built up, and what it costs.

The variant runs in a process of its own (`optimize.text_trial`); its texts are compared with the reference's here.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fettle.errors import PassError
from fettle.extract import Answer, Extract, disagreements, loss_in_words
from fettle.manifest import (
    AnswerSpec,
    BatchInvariance,
    LatencyTable,
    Measurements,
    Quality,
    TextQuality,
    VariantManifest,
)
from fettle.rows import Row
from fettle.text_trace import Trace, read_traces
from optimize import measure, text_tracing
from optimize.text_trial import Block, Exam, Examined, TextTrialResult
from optimize.text_work import TextWork

ALONE_ROWS, COST_ROWS, PERPLEXITY_ROWS, TUNING_ROWS = 128, 128, 128, 256
BATCHES = [1, 4, 8, 16]
# Prompts are timed up to this length at the least, where the context allows it.
LONG_PROMPT = 512
LATENCY_SECONDS = 4.0
# Of a token's log-probability: float32 kernels differ by 1e-6 or so between batch shapes, bfloat16 by 1e-2.
INVARIANCE_TOLERANCE = 1e-3
# exp of more would not be finite, and says no more.
LARGEST_NLL = 700.0


@dataclass(frozen=True, slots=True)
class Compared:
    """The reference's traces on the rows of `test`, its answers on the first rows of `validation` (none without that
    split), and its perplexity."""

    test: Sequence[Trace]
    tuning: Sequence[Answer]
    perplexity: float


def measure_text(
    work: TextWork, variant: VariantManifest, truth: Compared | None, fingerprint: str, report: measure.Report
) -> Measurements:
    """Try a variant; `truth` None for the reference itself.

    Raises:
        PassError: its process failed or crashed, or its values are not finite.
    """
    started = time.perf_counter()
    test = text_tracing.trace(work, variant, "test", report=lambda done: report(0.6 * done))
    tuning = []
    if truth is not None and truth.tuning:
        tuning = text_tracing.trace(
            work, variant, "validation", len(truth.tuning), report=lambda done: report(0.6 + 0.1 * done)
        )
    result, alone = _examined(work, variant, lambda done: report(0.7 + 0.3 * done))
    assert result.examined is not None
    found, rows = result.examined, work.rows("test")
    perplexity = _perplexity(found)
    reference = test if truth is None else truth.test
    other = perplexity if truth is None else truth.perplexity
    tuned = None
    if tuning and truth is not None:
        pairs = zip(tuning, truth.tuning, strict=True)
        tuned = float(np.mean([work.extract(trace.text) != answer for trace, answer in pairs]))
    costs = found.costs
    batching = batch_invariance(alone, test, work.extract, text_tracing.request_for(work, variant).slots)
    return Measurements(
        fingerprint=fingerprint,
        hardware=work.hardware,
        quality=_quality(work, test, reference, [] if batching.invariant else alone).model_copy(
            update={"text": _text_quality(work, test, reference, perplexity, other, found.scored)}
        ),
        batching=batching,
        tuned_disagreement=tuned,
        latency=LatencyTable(device="cpu", threads=work.config.threads, cells=found.steps),
        prompts=LatencyTable(device="cpu", threads=work.config.threads, cells=found.prompts),
        typical_length=typical_length(rows, reference),
        row_cpu_ms=max(1e-6, (costs.feed_ms + costs.decode_ms) / costs.rows),
        prompt_token_cpu_ms=costs.feed_ms / max(1, costs.prompt_tokens),
        decode_token_cpu_ms=costs.decode_ms / max(1, costs.drawn_tokens - costs.rows),
        peak_memory_bytes=result.peak_memory_bytes,
        load_seconds=result.load_seconds,
        seconds=time.perf_counter() - started,
    )


def typical_length(rows: Sequence[Row], reference: Sequence[Trace]) -> int:
    """Median tokens before a step of decoding: the prompt, and half of what the reference then writes."""
    pairs = zip(rows, reference, strict=True)
    return max(1, int(np.median([len(row) + trace.drawn // 2 for row, trace in pairs])))


def token_agreement(traces: Sequence[Trace], reference: Sequence[Trace]) -> tuple[float, float]:
    """Share of the reference's tokens, ends included, before the first difference; and of texts without any."""
    same, total, identical = 0, 0, 0
    for mine, theirs in zip(traces, reference, strict=True):
        before = _common(mine, theirs)
        whole = before == len(mine.ids) == len(theirs.ids) and mine.finish is theirs.finish
        same += theirs.drawn if whole else before
        total += theirs.drawn
        identical += whole
    return same / max(1, total), identical / max(1, len(traces))


def batch_invariance(
    alone: Sequence[Trace], together: Sequence[Trace], extract: Extract, slots: int
) -> BatchInvariance:
    """Whether texts depend on who shares the slots; `together` holds the same rows first.

    Invariant are texts that are the same to the token, each as probable, within the tolerance, in either company.
    """
    same = together[: len(alone)]
    difference = max((_difference(*pair) for pair in zip(alone, same, strict=True)), default=0.0)
    identical = token_agreement(alone, same)[1] == 1.0
    return BatchInvariance(
        rows=len(alone),
        batch=max(2, slots),
        changed=float(disagreements(_texts(alone), _texts(same), extract).mean()),
        max_difference=difference,
        tolerance=INVARIANCE_TOLERANCE,
        invariant=identical and difference <= INVARIANCE_TOLERANCE,
    )


def right_share(texts: Sequence[str], right: Sequence[str | None] | None, extract: Extract) -> float | None:
    """Share of the rows with a right answer that are answered so; None without such rows."""
    pairs = [] if right is None else list(zip(texts, right, strict=True))
    known = [(text, answer) for text, answer in pairs if answer is not None]
    if not known:
        return None
    return float(np.mean([extract(text) == extract(answer) for text, answer in known]))


def metric_name(answer: AnswerSpec) -> str:
    return "exact match" if answer.kind == "text" else "accuracy"


def _examined(work: TextWork, variant: VariantManifest, report: measure.Report) -> tuple[TextTrialResult, list[Trace]]:
    """The trial's figures, and the traces of the first rows alone."""
    rows = work.rows("test")
    count = min(ALONE_ROWS, len(rows))
    texts = [Row(ids) for ids in work.texts("test", PERPLEXITY_ROWS)]
    longest = work.reference.decoder.context
    prompt = max(map(len, rows))
    with tempfile.TemporaryDirectory() as name:
        block = Block(path=Path(name) / "alone.npz", first=0, last=count)
        exam = Exam(
            alone=block,
            cost_rows=min(COST_ROWS, len(rows)),
            texts_from=len(rows),
            batches=BATCHES,
            contexts=_lengths(min(longest - 1, prompt + work.max_tokens)),
            prompts=_lengths(min(longest - 1, max(prompt, LONG_PROMPT))),
            seconds=LATENCY_SECONDS,
        )
        request = text_tracing.request_for(work, variant).model_copy(update={"exam": exam})
        result = text_tracing.try_texts(request, [*rows, *texts], report)
        return result, read_traces(block.path)


def _lengths(longest: int) -> list[int]:
    return measure.timed_lengths(longest)


def _quality(work: TextWork, test: Sequence[Trace], reference: Sequence[Trace], alone: Sequence[Trace]) -> Quality:
    """`alone`: traces of the first rows by themselves, where they may be others."""
    answer = work.reference.task.answer
    assert answer is not None
    tried = [(test, reference), *([(alone, reference[: len(alone)])] if alone else [])]
    right = work.right_answers("test")
    return Quality(
        rows=len(test),
        disagreement=max(float(disagreements(_texts(a), _texts(b), work.extract).mean()) for a, b in tried),
        loss=loss_in_words(answer),
        max_difference=max((_difference(*pair) for pair in zip(test, reference, strict=True)), default=0.0),
        metric_name=None if right is None else metric_name(answer),
        metric=right_share(_texts(test), right, work.extract),
        reference_metric=right_share(_texts(reference), right, work.extract),
    )


def _text_quality(
    work: TextWork,
    test: Sequence[Trace],
    reference: Sequence[Trace],
    perplexity: float,
    other: float,
    scored: int,
) -> TextQuality:
    agreement, identical = token_agreement(test, reference)
    return TextQuality(
        max_tokens=work.max_tokens,
        tokens=float(np.mean([trace.drawn for trace in test])),
        token_agreement=agreement,
        identical_texts=identical,
        perplexity=perplexity,
        reference_perplexity=other,
        perplexity_tokens=scored,
    )


def _perplexity(found: Examined) -> float:
    if found.nll is None:
        raise PassError("its log-probabilities are not finite numbers")
    return math.exp(min(LARGEST_NLL, max(0.0, found.nll / max(1, found.scored))))


def _texts(traces: Sequence[Trace]) -> list[str]:
    return [trace.text for trace in traces]


def _common(mine: Trace, theirs: Trace) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(mine.ids), len(theirs.ids))
    different = np.flatnonzero(mine.ids[:size] != theirs.ids[:size])
    return int(different[0]) if len(different) else size


def _difference(mine: Trace, theirs: Trace) -> float:
    """The largest of the log-probabilities of the tokens that both begin with."""
    size = _common(mine, theirs)
    if not size:
        return 0.0
    return float(np.abs(mine.logprob[:size] - theirs.logprob[:size]).max())
