"""What passes between the HTTP side of text generation and whoever generates: a call, and pieces of text back.

The API knows this protocol and no more: not which variant answers, nor where. Sources in tests are scripted.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fettle.generation import Finish, GrammarSpec, Sampling, Token

if TYPE_CHECKING:
    from deployments.router import Asked

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """The client's own thresholds for stopping early, which nothing certifies; None of one: it stops nothing.

    `answer_pattern` is a regular expression that `deployments.safe_pattern` has nothing against; without one, the
    family's own answers are meant (`Task.answer`).
    """

    end_probability: float | None = None
    answer_confidence: float | None = None
    answer_pattern: str | None = None
    reasoning_budget: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TextCall:
    """All that one request asks for: of each of its prompts so many choices, admitted and cancelled as one.

    Attributes:
        id: the reply's.
        asked: family, class or pinned variant, terms, client.
        prompts: token ids, int32 [tokens] each, none empty, each with room for a token after it.
        choices: of each prompt; choice k of prompt p has the number p * choices + k.
        max_tokens: of each choice; None for as many as the context holds.
        ignore_end: the model's end tokens end nothing.
        stop, stop_ids: texts, and tokens, that end a choice; a text may span tokens.
        keep_stop: the text that ended a choice is part of it.
        prompt_logprobs: the first piece of each choice tells the prompt's own tokens.
        vote: one choice a prompt is answered, numbered by its prompt: what most of its `choices` candidates agree on.
        stream: whether somebody reads along.
        tokenize_ms: what making the prompts took.
    """

    id: str
    asked: Asked
    prompts: tuple[Ids, ...]
    sampling: Sampling
    choices: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_end: bool = False
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    keep_stop: bool = False
    grammar: GrammarSpec | None = None
    prompt_logprobs: bool = False
    early_stop: EarlyStop | None = None
    vote: bool = False
    stream: bool = False
    tokenize_ms: float = 0.0

    @property
    def answers(self) -> int:
        """How many choices come back."""
        return len(self.prompts) * (1 if self.vote else self.choices)


@dataclass(frozen=True, slots=True)
class Answering:
    """Who answers, and what is promised: `bound` is certified, "exact", or None for no promise."""

    variants: tuple[str, ...]
    point: str | None = None
    bound: float | Literal["exact"] | None = None
    gear: int = 0
    degraded: bool = False
    queue_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Votes:
    """Of so many candidates that were drawn, how many had the answer that won."""

    drawn: int
    won: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What a whole call took: tokens of all choices, those of prompts that were found in a cache, and the time.

    `variants` are those that answered in the end, where that is not what the first piece said.
    """

    completion_tokens: int
    cached_tokens: int = 0
    infer_ms: float = 0.0
    variants: tuple[str, ...] | None = None
    votes: tuple[Votes, ...] = ()
    explained: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of one choice since its last piece.

    Attributes:
        text: complete characters only, and nothing that may turn out to be a stop text.
        tokens: those that were generated since, the end token not among them; their text may come with a later piece.
        finish: with the choice's last piece, which may have neither text nor tokens.
        stopped_by: the stop text or token that ended it, if one did.
        prompt: with the choice's first piece, where the call wants them; the first one's logprob is nan.
        answering: with the call's first piece.
        spent: with the call's last one.
    """

    choice: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    stopped_by: str | int | None = None
    prompt: tuple[Token, ...] | None = None
    answering: Answering | None = None
    spent: Spent | None = None


class TextSource(Protocol):
    def open(self, call: TextCall) -> AsyncGenerator[Piece, None]:
        """Generate. Nothing happens before the first piece is asked for; closing the generator cancels the call.

        It is pulled: what was generated and not yet asked for waits at the source, whose business it is to bound that,
        and may come in fewer, longer pieces. The last piece of all has `spent`, and each choice has had a `finish`.

        Raises:
            OverloadedError, DeadlineError: before the first piece, it is refused; or later, its time is over.
            RequestError: the grammar cannot be compiled.
            EngineError, UnavailableError: it broke off.
        """
        ...
