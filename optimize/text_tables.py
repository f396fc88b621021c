"""What every threshold of early stopping would make of recorded generations, without replaying each.

A rising threshold stops a generation ever later, at places that the state machines of `fettle.stopping` give in one
pass; then any threshold is a look-up over all rows at once. `evaluate` gives what `fettle.text_trace.replay_steps`
gives, row by row, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fettle.extract import Answer, Extract
from fettle.findings import Step, StopGates, TextFigures, TextScore
from fettle.generation import Finish
from fettle.policy import passes
from fettle.stopping import AnswerPart, EndPart
from fettle.text_scores import FEATURES, Array, all_features, never_rises, scores_of
from fettle.text_trace import Trace, features_of, text_after

Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]

ALL_THE_WAY = StopGates()
NO_STOP = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """Milliseconds of processor time that a variant takes for a token of a prompt, and for each later one it draws."""

    prompt_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class Ends:
    """Where each row of a table ends, one value a row: `drawn` tokens, of which `kept` are the text.

    `wrong`: another answer than the reference's; `features` float64 [rows, FEATURES] of the text.
    """

    kept: Counts
    drawn: Counts
    wrong: Bools
    features: Array

    def __getitem__(self, chosen: NDArray[np.intp] | slice) -> Ends:
        return Ends(self.kept[chosen], self.drawn[chosen], self.wrong[chosen], self.features[chosen])


@dataclass(frozen=True)
class Options:
    """The places at which a threshold could stop each row, one after the other, its own end the last.

    `sure` float32 [places] rises within a row, to infinity; `first` says where each row's places begin.
    """

    sure: NDArray[np.float32]
    first: NDArray[np.intp]
    ends: Ends

    def at(self, threshold: float) -> Ends:
        below = np.add.reduceat(self.sure < np.float32(threshold), self.first, dtype=np.intp)
        return self.ends[self.first + below]


class Table:
    """The recorded generations of one variant on some rows, and what the reference answers there. At least one row.

    `stops_at_answers` is false where whoever serves cannot read answers from a text while it grows.
    """

    def __init__(
        self,
        traces: Sequence[Trace],
        costs: TokenCosts,
        reference: Sequence[Answer],
        extract: Extract,
        *,
        stops_at_answers: bool = True,
    ) -> None:
        self.traces, self.costs, self.stops_at_answers = traces, costs, stops_at_answers
        self._reference, self._extract = reference, extract
        self._options: dict[str, Options] = {}
        self._features: dict[int, Array] = {}

    def __len__(self) -> int:
        return len(self.traces)

    @cached_property
    def prompt_ms(self) -> Array:
        return self.costs.prompt_ms * np.array([trace.prompt for trace in self.traces], np.float64)

    @cached_property
    def lengths(self) -> Counts:
        return np.array([len(trace.ids) for trace in self.traces], np.int64)

    def cost_ms(self, drawn: Counts) -> Array:
        """By row: the prompt gives the first token, and each later one is a step of its own."""
        cost: Array = self.prompt_ms + self.costs.decode_ms * np.maximum(drawn - 1, 0)
        return cost

    def options(self, stop: StopGates) -> Options:
        """For gates of this kind; the threshold in it is of no account. At most one of its two gates may be there."""
        key = with_threshold(stop, 1.0).model_dump_json()
        if key not in self._options:
            self._options[key] = self._look(stop)
        return self._options[key]

    def ends(self, stop: StopGates) -> Ends:
        """Where these gates stop each row."""
        if stop.end is not None and stop.answer is not None:
            early = self.ends(StopGates(end=stop.end))
            late = self.ends(StopGates(answer=stop.answer))
            # At one token the end has precedence, since that token is then no part of the text.
            return _where(early.drawn <= late.drawn, early, late)
        return self.options(stop).at(threshold_of(stop))

    def running(self, score: TextScore, accept: float) -> Counts:
        """After how many tokens each row's score cannot reach `accept` any more, as far as that can be known."""
        if not never_rises(score):
            return np.full(len(self), NO_STOP)
        sums, lowest, first = self._falling
        features = np.full((len(sums), len(FEATURES)), np.nan)
        features[:, FEATURES.index("sum")], features[:, FEATURES.index("lowest")] = sums, lowest
        lost = ~passes(scores_of(score, features), accept)
        # The place behind each row's last token is no token.
        places = np.arange(len(lost)) - np.repeat(first, np.diff([*first, len(lost)])) + 1
        lost[first + self.lengths] = False
        found: Counts = np.minimum.reduceat(np.where(lost, places, NO_STOP), first)
        return found

    def features_after(self, count: int) -> Array:
        """Of the first `count` tokens, float64 [rows, FEATURES]; NaN for rows with fewer."""
        if count not in self._features:
            none = [np.nan] * len(FEATURES)
            rows = [
                all_features(features_of(trace, count, Finish.ESCALATED)) if len(trace.ids) >= count else none
                for trace in self.traces
            ]
            self._features[count] = np.array(rows, np.float64)
        return self._features[count]

    @cached_property
    def _falling(self) -> tuple[Array, Array, NDArray[np.intp]]:
        """Running sums and minima of log-probabilities, one more place a row, and where each row begins."""
        columns = [np.append(trace.logprob.astype(np.float64), np.nan) for trace in self.traces]
        first = np.cumsum([0, *(len(column) for column in columns[:-1])])
        sums = np.concatenate([np.cumsum(column) for column in columns])
        return sums, np.concatenate([np.minimum.accumulate(column) for column in columns]), first

    def _look(self, stop: StopGates) -> Options:
        sure: list[float] = []
        first: list[int] = []
        places: list[tuple[int, int]] = []
        wrong: list[bool] = []
        features: list[list[float]] = []
        for trace, truth in zip(self.traces, self._reference, strict=True):
            first.append(len(sure))
            for found, kept, drawn in (*_rising(trace, stop, self._extract), (np.inf, len(trace.ids), trace.drawn)):
                whole = found == np.inf
                text, finish = (trace.text, trace.finish) if whole else (text_after(trace, kept), _finish_of(stop))
                sure.append(found)
                places.append((kept, drawn))
                wrong.append(self._extract(text) != truth)
                features.append(all_features(features_of(trace, kept, finish)))
        kept_drawn = np.array(places, np.int64)
        ends = Ends(kept_drawn[:, 0], kept_drawn[:, 1], np.array(wrong), np.array(features, np.float64))
        return Options(np.array(sure, np.float32), np.array(first, np.intp), ends)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an operating point makes of each row: `wrong` bool, `cost_ms` and `given_up` [rows]; `drawn` [steps, rows].

    A row that does not reach a step draws nothing there, and every row that does draws something: `reached` says so.
    """

    wrong: Bools
    cost_ms: Array
    given_up: Bools
    drawn: Counts
    reached: Bools


def evaluate(steps: Sequence[Step], tables: Mapping[str, Table]) -> Evaluated:
    """Walk the steps with all rows at once."""
    rows = len(tables[steps[0].variant])
    left, wrong = np.ones(rows, np.bool_), np.zeros(rows, np.bool_)
    cost_ms, given_up = np.zeros(rows), np.zeros(rows, np.bool_)
    drawn, reached = np.zeros((len(steps), rows), np.int64), np.zeros((len(steps), rows), np.bool_)
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        ends, lost = attempt(step, tables[step.variant], last=last)
        taken = np.ones(rows, np.bool_) if last else accepted(step, ends) & ~lost
        reached[number] = left
        drawn[number] = np.where(left, ends.drawn, 0)
        cost_ms += np.where(left, tables[step.variant].cost_ms(ends.drawn), 0.0)
        given_up |= left & lost
        wrong |= left & taken & ends.wrong
        left &= ~taken
    return Evaluated(wrong, cost_ms, given_up, drawn, reached)


def attempt(step: Step, table: Table, *, last: bool) -> tuple[Ends, Bools]:
    """Where a step ends each row that reaches it, and which rows it gives up."""
    gates = step.text
    ends = table.ends(gates if gates is not None else ALL_THE_WAY)
    nowhere = np.zeros(len(table), np.bool_)
    if last or gates is None or gates.score is None:
        return ends, nowhere
    at = table.running(gates.score, step.gates[-1].threshold)
    for floor in gates.floors:
        missed = ~passes(scores_of(gates.score, table.features_after(floor.after)), floor.score)
        at = np.where(missed & (table.lengths >= floor.after), np.minimum(at, floor.after), at)
    lost = at <= ends.kept
    return Ends(np.where(lost, at, ends.kept), np.where(lost, at, ends.drawn), ends.wrong, ends.features), lost


def accepted(step: Step, ends: Ends) -> Bools:
    """Whose whole text has a score that the step's gate takes."""
    if step.text is None or step.text.score is None:
        return np.zeros(len(ends.wrong), np.bool_)
    return passes(scores_of(step.text.score, ends.features), step.gates[-1].threshold)


def figures(steps: Sequence[Step], tables: Mapping[str, Table], reference: str) -> TextFigures:
    """What the point costs and changes on these rows, beside the reference run to its own end."""
    found = evaluate(steps, tables)
    alone = tables[reference].ends(ALL_THE_WAY).drawn
    return TextFigures(
        rows=len(found.wrong),
        errors=int(found.wrong.sum()),
        disagreement=float(found.wrong.mean()),
        reached=found.reached.mean(axis=1).tolist(),
        tokens=found.drawn.mean(axis=1).tolist(),
        cost_ms=float(found.cost_ms.mean()),
        reference_tokens=float(alone.mean()),
        reference_cost_ms=float(tables[reference].cost_ms(alone).mean()),
        given_up=float(found.given_up.mean()),
    )


def threshold_of(stop: StopGates) -> float:
    gate = stop.end or stop.answer
    return gate.threshold if gate is not None else np.inf


def with_threshold(stop: StopGates, threshold: float) -> StopGates:
    """The same gate, at another threshold."""
    if stop.end is not None:
        return StopGates(end=stop.end.model_copy(update={"threshold": threshold}))
    if stop.answer is not None:
        return StopGates(answer=stop.answer.model_copy(update={"threshold": threshold}))
    return ALL_THE_WAY


def _rising(trace: Trace, stop: StopGates, extract: Extract) -> list[tuple[float, int, int]]:
    """(how sure, tokens kept, tokens drawn) wherever a generation is surer than ever before that it may stop."""
    if stop.end is not None:
        part: EndPart | AnswerPart = EndPart(stop.end)
    elif stop.answer is not None:
        part = AnswerPart(stop.answer, trace.pieces(), extract)
    else:
        return []
    best, found = np.float32(-1.0), []
    for index, token in enumerate(trace.tokens()):
        sure = np.float32(part.sure(token))
        if sure > best:
            best = sure
            found.append((float(sure), index if stop.end is not None else index + 1, index + 1))
    return found


def _finish_of(stop: StopGates) -> Finish:
    return Finish.EARLY_END if stop.end is not None else Finish.EARLY_ANSWER


def _where(first: Bools, left: Ends, right: Ends) -> Ends:
    return Ends(
        np.where(first, left.kept, right.kept),
        np.where(first, left.drawn, right.drawn),
        np.where(first, left.wrong, right.wrong),
        np.where(first[:, None], left.features, right.features),
    )
