"""What a router asks of a text generator's replica, and what comes back: plain values that travel between processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from deployments.text_source import EarlyStop, Ids
from fettle.errors import FettleError
from fettle.generation import Finish, GrammarSpec, Sampling, Token
from fettle.manifest import Step


@dataclass(frozen=True, slots=True, eq=False)
class TextWork:
    """A call, or one step's part of it. See `deployments.text_source.TextCall` for what is named as there.

    Attributes:
        end_ids: tokens that end a choice, the model's own and the caller's.
        step: of an operating point, how the generation is stopped, scored and given up; None for nothing of it.
        last: no other step follows this one.
        vote: the confidence of a vote among the choices of each prompt, 0 for the lossless kind; None for no vote.
        only: of all choices those that are still wanted; None for all.
        given: by choice, what another replica has generated and told already.
        trace: the span that the replica's own belongs to, if the call is traced.
    """

    id: str
    prompts: tuple[Ids, ...]
    sampling: Sampling
    max_tokens: tuple[int, ...]
    choices: int = 1
    min_tokens: int = 0
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    grammar: GrammarSpec | None = None
    prompt_logprobs: bool = False
    early_stop: EarlyStop | None = None
    step: Step | None = None
    last: bool = True
    vote: float | None = None
    stream: bool = False
    priority: int = 0
    only: tuple[int, ...] | None = None
    given: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    trace: str | None = None

    @property
    def numbers(self) -> Sequence[int]:
        """Of the choices that are wanted: choice k of prompt p is p * choices + k."""
        return range(len(self.prompts) * self.choices) if self.only is None else self.only

    @property
    def answers(self) -> Sequence[int]:
        """The numbers under which something comes back; of a vote those of the prompts."""
        return self.numbers if self.vote is None else range(len(self.prompts))


@dataclass(frozen=True, slots=True)
class Bit:
    """What came of one choice since its last bit.

    Attributes:
        finish, error: with the last one, either of them.
        stopped_by: the stop string or the end token that ended it.
        cached: tokens of the prompt that were known; told once.
        score: of the step, with the last bit; NaN where it has none.
        votes: of a vote's winner, (drawn, won).
    """

    choice: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    error: FettleError | None = None
    stopped_by: str | int | None = None
    prompt: tuple[Token, ...] | None = None
    cached: int = 0
    score: float = float("nan")
    votes: tuple[int, int] | None = None

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None

    def __reduce__(self) -> tuple[type[Bit], tuple[Any, ...]]:
        """Pickled by its arguments: what dataclasses bring along for it takes three times as long."""
        return Bit, _BIT_VALUES(self)


_BIT_VALUES = attrgetter(*(each.name for each in fields(Bit)))


def merged(bits: Iterable[Bit]) -> list[Bit]:
    """One bit for each choice, in the order in which choices first had something to tell."""
    found: dict[int, Bit] = {}
    for bit in bits:
        before = found.get(bit.choice)
        found[bit.choice] = bit if before is None else _joined(before, bit)
    return list(found.values())


def _joined(first: Bit, then: Bit) -> Bit:
    return Bit(
        then.choice,
        first.text + then.text,
        first.tokens + then.tokens,
        then.finish,
        then.error,
        then.stopped_by,
        first.prompt if then.prompt is None else then.prompt,
        first.cached + then.cached,
        then.score,
        then.votes,
    )
