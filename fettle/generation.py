"""What passes between the router and a text generator's worker: prompts with their terms, and tokens back.

Token ids only: texts become ids, and ids become text, outside the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from operator import attrgetter
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fettle.errors import FettleError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn, with the meaning that OpenAI's and vLLM's documents give to these names.

    `temperature` 0 is greedy: the most likely token, the lowest id of several. `top_k` 0 is no limit. `seed` None draws
    one at random. `logprobs` is how many of the most likely tokens are told beside each token's own log-probability;
    None tells neither. Log-probabilities are of the model's distribution, before temperature, penalties and bias.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


GREEDY = Sampling(temperature=0.0)


class Finish(StrEnum):
    """Why a generation ended. The first two are OpenAI's; the others are told beside them."""

    STOP = "stop"
    LENGTH = "length"
    CONTEXT = "context"
    CANCELLED = "cancelled"
    EARLY_END = "early_end"
    EARLY_ANSWER = "early_answer"
    EARLY_VOTE = "early_vote"
    ESCALATED = "escalated"

    @property
    def early(self) -> bool:
        """Whether it was stopped before its own end; of a character that is incomplete there, nothing is shown."""
        return self in (Finish.EARLY_END, Finish.EARLY_ANSWER, Finish.EARLY_VOTE, Finish.ESCALATED)


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `logprob` is nan where none was asked for, `top` the most likely ones with theirs.

    `end` is the model's probability of ending here instead (the sum over the end tokens), nan where nobody asked.
    """

    id: int
    logprob: float = float("nan")
    top: tuple[tuple[int, float], ...] = ()
    end: float = float("nan")

    def __reduce__(self) -> tuple[type[Token], tuple[object, ...]]:
        """Pickled by its arguments: what dataclasses bring along for it takes three times as long."""
        return Token, _TOKEN_VALUES(self)


_TOKEN_VALUES = attrgetter(*(each.name for each in fields(Token)))


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What a text has to be, as it was asked for; compiled where it is generated (`fettle.grammar`).

    `value` is a JSON schema as text, a regular expression, or the choices; of `json_object`, nothing.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice"]
    value: str | tuple[str, ...] = ""


class Constraint(Protocol):
    """A grammar under way in one generation. Made by `fettle.grammar`; stateful, one for each choice."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next, bool [vocabulary]; None for all."""
        ...

    def advance(self, token: int) -> None:
        """The token was chosen."""
        ...


# Looks at the tokens that a step gave to one generation, and says whether it ends there, and why.
Watcher = Callable[[Sequence[Token]], Finish | None]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One choice to generate. `ids` int32 [tokens], at least one.

    Attributes:
        max_tokens: at most so many are generated.
        end_ids: tokens that end the text; they are not part of it.
        min_tokens: end tokens are not drawn before so many.
        choice: of several choices of one request, its number; the draw depends on (seed, choice, position) alone.
        constraint: masks what does not fit a grammar.
        watch: see `Watcher`; called on the engine's thread, so it must be quick.
        want_end: whether `Token.end` is wanted.
        prompt_logprobs: whether the log-probabilities of the prompt's own tokens are wanted (`Step.prompt`).
        priority: lower first, as `fettle.scheduling.Priority`; the worker preempts higher ones for memory.
        given: tokens of the output that another worker has generated and told already; it goes on after them.
    """

    id: str
    ids: NDArray[np.int32]
    max_tokens: int
    sampling: Sampling = Sampling()
    end_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    choice: int = 0
    constraint: Constraint | None = None
    watch: Watcher | None = None
    want_end: bool = False
    prompt_logprobs: bool = False
    priority: int = 0
    given: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the engine did for one generation: new tokens, and how it ended, if it did.

    Attributes:
        end: the end token that was drawn, if one was; it is not among `tokens`.
        error: instead of `finish` where it failed; the tokens before it stay good.
        cached: told with the first token, how many of the prompt's tokens were known from an earlier generation.
        prompt: told with the first token, where the prompt's own log-probabilities were asked for: a `Token` for each
            token of the prompt, the first one's logprob nan.
    """

    id: str
    tokens: tuple[Token, ...]
    finish: Finish | None = None
    end: Token | None = None
    error: FettleError | None = None
    cached: int = 0
    prompt: tuple[Token, ...] | None = None

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None
