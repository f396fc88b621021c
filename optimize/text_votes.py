"""Votes among sampled texts: all choices of each calibration row, written once, and how early their vote may end.

They are the original's weights, on ONNX Runtime where there is a graph, as points for greedy texts fall back on; the
service draws from torch, whose logits differ in the last digits. `optimize.vote_calibration` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

from fettle.errors import PassError, UsageError
from fettle.extract import Answer, FunctionAnswer
from fettle.findings import VotePoint
from fettle.manifest import VariantManifest
from fettle.text_trace import Trace
from optimize import text_tracing
from optimize.text_finish import stand_in
from optimize.text_trial import Drawing
from optimize.text_work import TextWork
from optimize.vote_calibration import VoteRows, certify_votes

SPLIT = "calibration"


def check_votes(work: TextWork) -> None:
    """Raises UsageError for votes that nobody could hold: no calibration rows, or answers that no replica can read."""
    if work.config.votes is None:
        return
    if not work.has(SPLIT):
        raise UsageError("--votes: the data have no calibration split; give --calibration or --data", param="votes")
    if isinstance(work.reference.task.answer, FunctionAnswer):
        raise UsageError(
            "--votes: a service reads no answers with a Python function; use --answer labels, text or a pattern",
            param="votes",
        )


def certified_votes(work: TextWork, variants: Mapping[str, VariantManifest]) -> tuple[list[VotePoint], list[str]]:
    """The lossless vote and those certified at the levels, and what is to be said of levels without one."""
    config = work.config
    if config.votes is None:
        return [], []
    drawing = Drawing(choices=config.votes, temperature=config.vote_temperature, seed=config.seed)
    try:
        traces = text_tracing.trace(work, stand_in(variants), SPLIT, drawing=drawing)
    except PassError as error:
        return [], [f"votes were not calibrated: {error.message}"]
    rows = VoteRows(_answers(work, traces, config.votes), config.vote_temperature)
    found = certify_votes(rows, sorted(config.levels), config.delta)
    said = [f"no vote within {level.alpha:g}: {level.reason}" for level in found.levels if level.reason]
    return [found.lossless, *found.points], said


def _answers(work: TextWork, traces: list[Trace], choices: int) -> list[list[Answer]]:
    answers = [work.extract(trace.text) for trace in traces]
    return [answers[first : first + choices] for first in range(0, len(answers), choices)]
