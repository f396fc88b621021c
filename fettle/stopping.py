"""When a generation ends early: pure state machines over its own tokens.

A text ends where ending was probable enough, or where the answer in it is complete and sure; a cheap variant's attempt
is given up as soon as it will not be accepted. Each decision depends on the generation's own tokens alone, not on the
steps in which they come, so that `fettle.text_trace` makes the same one from a recorded text. Which thresholds may be
trusted is `optimize.text_certify`'s; votes among several texts are `fettle.votes`, and budgets for reasoning, which
force tokens rather than stop, `fettle.reasoning`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import numpy as np

from fettle.extract import Answer, Extract
from fettle.findings import AnswerGate, EndGate, Floor, Step, StopGates, TextGates, TextScore
from fettle.generation import Finish, Token
from fettle.text_scores import Tally, never_rises, score_of

# An answer is looked for at most so often while a text grows to twice its length, about.
SPARSE: Final = 32
# The text that a token adds: an incremental detokenizer's next piece, empty while a character is incomplete.
Piece = Callable[[int], str]


class Part(Protocol):
    """One reason to stop. `look` is called once for each token, in order."""

    def look(self, token: Token) -> Finish | None: ...


class EndPart:
    """Stops before a token where ending instead was probable; that token is not part of the text."""

    def __init__(self, gate: EndGate) -> None:
        self._threshold = gate.threshold
        self._min_tokens = gate.min_tokens
        self._count = 0

    def look(self, token: Token) -> Finish | None:
        return Finish.EARLY_END if reaches(self.sure(token), self._threshold) else None

    def sure(self, token: Token) -> float:
        """How probable it was to end before this token; NaN where that is not allowed."""
        before, self._count = self._count, self._count + 1
        return token.end if before >= self._min_tokens else math.nan


class AnswerPart:
    """Stops after a token where the answer in the text is the same as before, and its own tokens were probable.

    The answer's tokens are those that cover its last occurrence in the text in which it was first read, whatever the
    case; all tokens up to there where the text has it in other words.
    """

    def __init__(self, gate: AnswerGate, piece: Piece, extract: Extract) -> None:
        self._gate, self._piece, self._extract = gate, piece, extract
        self.answer: Answer | None = None
        self._next = gate.first
        self._stable = 0
        self._sure = math.nan
        self._pieces: list[str] = []
        self._ends: list[int] = []
        self._logprobs: list[float] = []

    def look(self, token: Token) -> Finish | None:
        return Finish.EARLY_ANSWER if reaches(self.sure(token), self._gate.threshold) else None

    def sure(self, token: Token) -> float:
        """The measure of the answer's tokens; NaN where none is looked for, found, or stable."""
        piece = self._piece(token.id)
        self._pieces.append(piece)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(piece))
        self._logprobs.append(float(np.float32(token.logprob)))
        count = len(self._pieces)
        if count < self._next:
            return math.nan
        # A look reads the whole text, so that without this the work would grow with the square of its length.
        self._next = count + max(self._gate.every, count // SPARSE)
        self._read("".join(self._pieces))
        return self._sure if self._stable >= self._gate.stable else math.nan

    def _read(self, text: str) -> None:
        answer = self._extract(text)
        if not answer.found:
            self.answer, self._stable, self._sure = None, 0, math.nan
        elif answer == self.answer:
            self._stable += 1
        else:
            self.answer, self._stable = answer, 1
            self._sure = self._measure(text, answer)

    def _measure(self, text: str, answer: Answer) -> float:
        own = self._logprobs[tokens_of(answer.value, text, self._ends)]
        if not own or any(math.isnan(logprob) for logprob in own):
            return math.nan
        return math.exp(math.fsum(own) if self._gate.measure == "product" else min(own))


class GiveUpPart:
    """Stops an attempt that will not be accepted, or is not likely to be: its score is below a floor.

    Where the score can only fall as the text grows, an attempt whose score so far misses `accept` is lost: giving it up
    changes no answer. At the floors it is given up on a guess, which costs the next step where the guess is wrong.
    """

    def __init__(self, score: TextScore, accept: float, floors: Sequence[Floor] = ()) -> None:
        self._score, self._accept = score, accept
        self._always = never_rises(score)
        self._floors = {floor.after: floor.score for floor in floors}
        self._tally = Tally()

    def look(self, token: Token) -> Finish | None:
        self._tally.add(token.logprob)
        floor = self._floors.get(self._tally.count)
        if floor is None and not self._always:
            return None
        score = score_of(self._score, self._tally)
        if self._always and not reaches(score, self._accept):
            return Finish.ESCALATED
        return Finish.ESCALATED if floor is not None and not reaches(score, floor) else None


class Watch:
    """The early stopping of one generation: `see` is its `fettle.generation.Watcher`.

    The first of the parts that stops at a token has the last word. `tokens` are the ones looked at, of which the first
    `kept` are the text; what comes behind them in the same step is neither looked at nor part of it.
    """

    def __init__(self, *parts: Part) -> None:
        self._parts = parts
        self.tokens = 0
        self.finish: Finish | None = None

    def see(self, tokens: Sequence[Token]) -> Finish | None:
        for token in tokens:
            if self.finish is not None:
                break
            self.tokens += 1
            self.finish = next(self._verdicts(token), None)
        return self.finish

    @property
    def kept(self) -> int:
        return self.tokens - 1 if self.finish is Finish.EARLY_END else self.tokens

    def _verdicts(self, token: Token) -> Iterator[Finish]:
        for part in self._parts:
            if (finish := part.look(token)) is not None:
                yield finish


def watch(gates: StopGates, piece: Piece, extract: Extract | None, *, accept: float | None = None) -> Watch | None:
    """The watch for these gates; None where nothing of it could ever stop a generation.

    Args:
        piece: this generation's own; it is called with every token while an answer is looked for.
        extract: what the answer is; without it no answer is looked for.
        accept: the gate that a score has to reach, where another step follows that would answer instead.
    """
    parts: list[Part] = []
    # The end comes first, since the token at which it stops counts for nothing else.
    if gates.end is not None:
        parts.append(EndPart(gates.end))
    if isinstance(gates, TextGates) and gates.score is not None and accept is not None:
        parts.append(GiveUpPart(gates.score, accept, gates.floors))
    if gates.answer is not None and extract is not None:
        parts.append(AnswerPart(gates.answer, piece, extract))
    return Watch(*parts) if parts else None


def watch_step(step: Step, piece: Piece, extract: Extract | None, *, last: bool) -> Watch | None:
    """The watch for one step of an operating point; `last`: no other follows."""
    if step.text is None:
        return None
    return watch(step.text, piece, extract, accept=None if last else step.gates[-1].threshold)


def wants_end(gates: StopGates) -> bool:
    """Whether the engine has to tell `Token.end`: also where the whole text's score has the end as a factor."""
    return gates.end is not None or (isinstance(gates, TextGates) and gates.score is not None)


def wants_logprobs(gates: StopGates) -> bool:
    """Whether the engine has to tell `Token.logprob`."""
    return gates.answer is not None or (isinstance(gates, TextGates) and gates.score is not None)


def takes(finish: Finish, score: float, step: Step, *, last: bool) -> bool:
    """Whether a step's answer is taken: the last one always, an earlier one by its score, none that was given up."""
    return last or (finish is not Finish.ESCALATED and reaches(score, step.gates[-1].threshold))


def reaches(value: float, threshold: float) -> bool:
    """As `fettle.policy.passes`, for one value: compared in float32, and NaN reaches nothing."""
    return bool(np.float32(value) >= np.float32(threshold))


def tokens_of(value: str, text: str, ends: Sequence[int]) -> slice:
    """The tokens that an answer consists of.

    Args:
        ends: for each token, how long the text is with it, in characters.
    """
    at = text.rfind(value) if value else -1
    if at < 0 and value:
        folded = text.casefold()
        # Where folding changes the length, places in the folded text say nothing about the tokens.
        at = folded.rfind(value.casefold()) if len(folded) == len(text) else -1
    if at < 0:
        return slice(0, len(ends))
    first = next(index for index, end in enumerate(ends) if end > at)
    last = next(index for index, end in enumerate(ends) if end >= at + len(value))
    return slice(first, last + 1)
