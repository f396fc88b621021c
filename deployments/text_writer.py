"""One choice as it is written: tokens to text, stop strings, early stopping and the score, on the engine's thread."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deployments.text_work import Bit, TextWork
from fettle import stopping
from fettle.detokenize import Detokenizer, StopStrings
from fettle.extract import Extract, FunctionAnswer, PatternAnswer, extractor
from fettle.findings import AnswerGate, EndGate, StopGates
from fettle.generation import Finish, Step, Token
from fettle.manifest import Task
from fettle.text_scores import score_of, tally


class Writer:
    """`see` is the generation's `Watcher`; `bit` says what a step of the engine has added."""

    def __init__(self, work: TextWork, choice: int, detokenizer: Detokenizer, extract: Extract | None) -> None:
        self.choice = choice
        self.text = ""
        self._work = work
        prompt = work.prompts[choice // work.choices]
        before = prompt[-32:].tolist()
        self._stream = detokenizer.stream(before=before)
        self._stops = StopStrings(work.stop, include=work.keep_stop)
        self._watch = _watch(work, detokenizer, before, extract)
        self._end = math.nan
        self._logprobs: list[float] = []
        self._fresh_text: list[str] = []
        self._fresh: list[Token] = []
        # What was told already has no log-probabilities any more, so a score over it would be another one.
        for token in work.given.get(choice, ()):
            self.see([Token(token)])
        self._take()

    def see(self, tokens: Sequence[Token]) -> Finish | None:
        """A stop string goes before what stops early; a token before which the text ended early is not part of it."""
        for token in tokens:
            early = self._watch.see([token]) if self._watch is not None else None
            if early is Finish.EARLY_END:
                self._end = token.end
                return early
            self._fresh.append(token)
            self._logprobs.append(token.logprob)
            self._add(self._stops.push(self._stream.push(token.id)))
            if self._stops.matched is not None:
                return Finish.STOP
            if early is not None:
                return early
        return None

    def bit(self, step: Step) -> Bit:
        """What a step gave, once `see` has seen its tokens."""
        if step.finish is not None and self._stops.matched is None:
            if not step.finish.early:
                self._add(self._stops.push(self._stream.finish()))
            self._add(self._stops.finish())
        text, tokens = self._take()
        return Bit(
            self.choice,
            text,
            tokens,
            step.finish,
            step.error,
            stopped_by=self._stopped_by(step),
            prompt=step.prompt,
            cached=step.cached,
            score=math.nan if step.finish is None else self._score(step),
        )

    def _stopped_by(self, step: Step) -> str | int | None:
        if step.finish is not Finish.STOP:
            return None
        return self._stops.matched or (None if step.end is None else step.end.id)

    def _score(self, step: Step) -> float:
        gates = None if self._work.step is None else self._work.step.text
        if gates is None or gates.score is None:
            return math.nan
        end = self._end if step.end is None else step.end.end
        return score_of(gates.score, tally(self._logprobs, end))

    def _add(self, text: str) -> None:
        if text:
            self.text += text
            self._fresh_text.append(text)

    def _take(self) -> tuple[str, tuple[Token, ...]]:
        text, tokens = "".join(self._fresh_text), tuple(self._fresh)
        self._fresh_text, self._fresh = [], []
        return text, tokens


def extract_of(task: Task) -> Extract | None:
    """How answers are read from texts; None where the family does not say, or by a function of the user's.

    Such a function belongs to whoever optimizes: a service imports no code that a family names.
    """
    if task.answer is None or isinstance(task.answer, FunctionAnswer):
        return None
    return extractor(task.answer)


def gates_of(work: TextWork) -> StopGates | None:
    """The certified gates of the step, or the client's own."""
    if work.step is not None and work.step.text is not None:
        return work.step.text
    own = work.early_stop
    if own is None:
        return None
    end = None if own.end_probability is None else EndGate(threshold=own.end_probability)
    answer = None if own.answer_confidence is None else AnswerGate(threshold=own.answer_confidence)
    return None if end is None and answer is None else StopGates(end=end, answer=answer)


def _watch(
    work: TextWork, detokenizer: Detokenizer, before: Sequence[int], extract: Extract | None
) -> stopping.Watch | None:
    gates = gates_of(work)
    if gates is None:
        return None
    piece = detokenizer.stream(before=before).push
    if work.step is not None and work.step.text is not None:
        return stopping.watch_step(work.step, piece, extract, last=work.last)
    pattern = None if work.early_stop is None else work.early_stop.answer_pattern
    if pattern is not None:
        extract = extractor(PatternAnswer(pattern=pattern))
    return stopping.watch(gates, piece, extract)
