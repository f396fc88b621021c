"""The router's core: what a request means, whether it may enter, which way answers it, and its walk along that way.

Knows neither HTTP nor Ray: the batchers are given. `deployments.api` is its border to HTTP, `deployments.app` binds it
to Ray. The walk takes and passes on rows by the rule that certificates were made with (`fettle.points.judge`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from deployments.bounds import Holding, Telling, before, is_retried
from deployments.journal import Journal
from deployments.served import Quality, ServedFamily
from deployments.telemetry import Telemetry
from deployments.tickets import Terms
from deployments.tracing import Trace
from deployments.trial import Trial
from deployments.walk import Walked, walk
from deployments.watch import Watch
from fettle.config import LimitConfig
from fettle.errors import (
    DeadlineError,
    FettleError,
    RateLimitedError,
    RequestError,
    TooLargeError,
    UnknownModelError,
)
from fettle.limits import KeyLimits
from fettle.manifest import TaskKind
from fettle.menu import EXACT, Way
from fettle.rows import Row
from fettle.scheduling import NEVER, Priority
from fettle.tokenizer import Text

# Above this many characters tokenization leaves the event loop, so that one large request does not stall the rest.
TOKENIZE_INLINE_CHARACTERS = 20_000
LONGEST_TIMEOUT_S = 3600.0
# A reply has its own way back, and Serve, which knows the same header, ends a request at its time with an error of its
# own shape: so the deadline is this much earlier, or a tenth of the time where that is less.
MARGIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: an API key's name, weight and limits; all the same where there are no keys."""

    name: str = ""
    weight: float = 1.0
    limits: KeyLimits = field(default_factory=KeyLimits)


ANYBODY = Client()


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request says about how it is to be answered. None: nothing said."""

    max_disagreement: float | str | None = None
    allow_degraded: bool = False
    priority: Literal["interactive", "batch"] = "interactive"
    timeout_s: float | None = None
    explain: bool = False
    session: str | None = None
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that is understood: of which family, in which class or of which variant, on what terms.

    `takes_part`: in a rollout, if there is one; `instead`: the same of the version that its family is to replace.
    """

    family: ServedFamily
    quality: Quality
    terms: Terms
    client: Client
    degraded: bool = False
    explain: bool = False
    takes_part: bool = True
    instead: Asked | None = None

    def of_old_version(self) -> Asked | None:
        """The same request of the version that its family is to replace, if that can answer the same rows."""
        old = self.instead
        if old is None or old.family.family.manifest.tokenizer_files != self.family.family.manifest.tokenizer_files:
            return None
        # What it took elsewhere says nothing about the old version.
        return replace(old, takes_part=False)


@dataclass(slots=True, eq=False)
class Tokenized:
    """A request's rows, how many `tokens` they have together, how many were cut, and how long it took."""

    rows: list[Row]
    ms: float
    tokens: int = field(init=False)
    truncated: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum([len(row) for row in self.rows])
        self.truncated = sum([row.truncated for row in self.rows])


@dataclass(frozen=True, slots=True)
class Inferred:
    """A request's answers and the way that gave them. `degraded`: outside the class, as the request allowed.

    `asked`: of the version that answered, if the one that was to could not.
    """

    asked: Asked
    way: Way
    gear: int
    degraded: bool
    walked: Walked


@dataclass(slots=True)
class Router:
    """See the module. `id` tells this router from others in replies and reports."""

    families: Mapping[str, ServedFamily]
    limits: LimitConfig
    classes: Mapping[str, float] = field(default_factory=dict)
    telemetry: Telemetry = field(default_factory=Telemetry)
    watch: Watch = field(default_factory=Watch)
    journal: Journal = field(default_factory=Journal)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    trials: Mapping[str, Trial] = field(default_factory=dict)

    @property
    def settled(self) -> list[ServedFamily]:
        """The families without the new versions that are on trial."""
        new = {trial.new.name for trial in self.trials.values()}
        return [family for family in self.families.values() if family.name not in new]

    def find(self, model: str | None, kind: TaskKind | None = None) -> tuple[ServedFamily, str | None]:
        """Resolve `family` or `family:variant`; None means the only family that does this kind of task.

        Raises:
            UnknownModelError: no such family or variant is served.
            RequestError: the family does another task, or several could be meant.
        """
        if model is None:
            return self._only(kind), None
        name, _, pinned = model.partition(":")
        family = self.families.get(name)
        if family is None or (pinned and pinned not in family.batchers):
            raise UnknownModelError(f"model {model!r} is not served; there are {self._models()}", param="model")
        if kind is not None and family.task.kind is not kind:
            raise RequestError(
                f"model {name!r} does not {kind.value}: its task is {family.task.kind.value}", param="model"
            )
        return family, pinned or None

    def ask(self, model: str | None, kind: TaskKind, wishes: Wishes | None = None, client: Client = ANYBODY) -> Asked:
        """Understand a request.

        Raises:
            UnknownModelError, RequestError: see `find`; or a class that is none, or a class for a pinned variant.
        """
        wishes = wishes or Wishes()
        family, pinned = self.find(model, kind)
        now = time.monotonic()
        terms = Terms(
            arrived=now,
            deadline=NEVER
            if wishes.timeout_s is None
            else now + wishes.timeout_s - min(MARGIN_S, 0.1 * wishes.timeout_s),
            priority=Priority.BATCH if wishes.priority == "batch" else Priority.INTERACTIVE,
            key=client.name,
            weight=client.weight,
            trace=wishes.trace,
        )
        quality = self._quality(family, pinned, wishes.max_disagreement)
        asked = Asked(family, quality, terms, client, wishes.allow_degraded, wishes.explain, pinned is None)
        trial = self.trial_of(asked)
        if trial is not None and trial.draw(wishes.session):
            quality = self._quality(trial.new, None, wishes.max_disagreement)
            new = replace(asked, family=trial.new, quality=quality, instead=asked)
            return new if self._has_room(new) else asked
        return asked

    def check_room(self, asked: Asked, inputs: int) -> None:
        """Refuse early, before tokenization costs anything.

        Raises:
            TooLargeError: more inputs than one request may have.
            RateLimitedError: the key's limits are reached, or its quota is used up.
            OverloadedError, DeadlineError: no point that may answer has room, or time.
        """
        self.check_inputs(inputs)
        try:
            asked.client.limits.check(asked.client.name, time.monotonic())
        except RateLimitedError:
            self.telemetry.refused(asked.family.name, "limited")
            raise
        self.choose(asked)

    def check_inputs(self, inputs: int) -> None:
        """Raises TooLargeError for more inputs than one request may have."""
        if inputs > self.limits.max_inputs:
            raise TooLargeError(
                f"{inputs} inputs in one request, the limit is {self.limits.max_inputs}; send several requests",
                param="input",
            )

    async def tokenize(
        self, family: ServedFamily, texts: Sequence[Text], *, max_length: int | None = None, truncate: bool = True
    ) -> Tokenized:
        """Texts or pairs to rows."""

        def encode() -> list[Row]:
            return family.tokenizer.encode(texts, max_length=max_length, truncate=truncate)

        if sum(map(_characters, texts)) > TOKENIZE_INLINE_CHARACTERS:
            return await asyncio.to_thread(_timed, encode)
        return _timed(encode)

    def rows_of_ids(
        self,
        family: ServedFamily,
        lists: Sequence[Sequence[int]],
        *,
        max_length: int | None = None,
        truncate: bool = True,
    ) -> Tokenized:
        """Rows from token ids that the client made."""
        row = family.tokenizer.row_of_ids
        return _timed(
            lambda: [row(ids, index=index, max_length=max_length, truncate=truncate) for index, ids in enumerate(lists)]
        )

    async def infer(self, asked: Asked, tokenized: Tokenized) -> Inferred:
        """Answer the rows along the way that the class's gear names.

        Raises:
            DeadlineError: they cannot be, or were not, answered in time.
            OverloadedError: every point that may answer has a full queue.
            EngineError, UnavailableError: see `Batcher.answer`.
        """
        if asked.terms.trace is not None:
            asked.terms.trace.tokenized(tokenized.ms)
        await self.watch.informed()
        with Holding(asked.client.limits, tokenized.tokens):
            try:
                return await self._infer(asked, tokenized)
            except FettleError as error:
                old = asked.of_old_version()
                if old is None or not is_retried(error):
                    raise
                return await self._infer(old, tokenized)

    async def _infer(self, asked: Asked, tokenized: Tokenized) -> Inferred:
        family, trial = asked.family, self.trial_of(asked)
        # Drawn before anything is known of the way or the load, so that neither decides what is looked at.
        sample = self.watch.draw(len(tokenized.rows))
        compared = trial.sample(len(tokenized.rows)) if trial is not None and family is trial.new else []
        way, gear = self.choose(asked)
        family.demand.comes(way, [len(row) for row in tokenized.rows])
        with self.counted(asked):
            walked = await before(asked.terms.deadline, walk(family, way, tokenized.rows, asked.terms))
        degraded = asked.degraded and way.alpha > asked.quality.tolerance
        inferred = Inferred(asked, way, gear, degraded, walked)
        total_ms = (time.monotonic() - asked.terms.arrived) * 1000
        if trial is not None:
            trial.answered(family, total_ms)
            trial.saw(way, walked, tokenized.rows, compared)
        self.watch.saw(family, asked.quality, way, walked, tokenized.rows, sample)
        self.telemetry.answered(
            family.name,
            family.level_name(asked.quality),
            way.name,
            walked.places,
            tokenize_ms=tokenized.ms,
            queue_ms=walked.queue_ms,
            infer_ms=walked.infer_ms,
            total_ms=total_ms,
            tokens=tokenized.tokens,
        )
        return inferred

    def trial_of(self, asked: Asked) -> Trial | None:
        """The rollout that a request takes part in, at the old version or the new one; none of a pinned one."""
        return self.trials.get((asked.instead or asked).family.name) if asked.takes_part else None

    def _has_room(self, asked: Asked) -> bool:
        """Whether some way of the request's has room and time, and its replicas run."""
        for way in self.ways(asked):
            batchers = [asked.family.batchers[variant] for variant in way.variants]
            free = all(each.is_ready and each.has_room(asked.terms) for each in batchers)
            if free and batchers[0].can_meet(asked.terms):
                return True
        return False

    def _quality(self, family: ServedFamily, pinned: str | None, wanted: float | str | None) -> Quality:
        if pinned is not None:
            if wanted is not None:
                raise RequestError(
                    f"max_disagreement is for a family; {family.name}:{pinned} is one variant, which is never replaced",
                    param="max_disagreement",
                )
            return Quality.pinned_to(pinned)
        if wanted is None:
            return family.default
        if wanted == EXACT:
            return Quality.of(0.0)
        if isinstance(wanted, str):
            if wanted not in self.classes:
                names = ", ".join(["a share from 0 to 1", EXACT, *self.classes])
                raise RequestError(
                    f"max_disagreement: {wanted!r} is no class; give one of {names}", param="max_disagreement"
                )
            return Quality.of(self.classes[wanted], wanted)
        return Quality.of(wanted)

    def ways(self, asked: Asked) -> Sequence[Way]:
        """Who may answer, from the most faithful to the cheapest."""
        if asked.quality.variant is not None:
            return [asked.family.menu.pinned(asked.quality.variant)]
        return asked.family.menu.gears(asked.quality.tolerance, degraded=asked.degraded)

    def choose(self, asked: Asked, only: Sequence[Way] | None = None) -> tuple[Way, int]:
        """The way of the present gear, or a cheaper one of the class where that has no room or no time.

        Where one of its variants has no replica another way of the class that runs, else this one, if there is time.

        `only`: among these alone.

        Raises:
            OverloadedError: none has room; says when to come back.
            DeadlineError: those that have room cannot answer in time.
        """
        family, quality = asked.family, asked.quality
        ways = self.ways(asked) if only is None else only
        pinned = quality.variant is not None
        gear = 0 if pinned else family.gearbox.number(quality.tolerance, asked.degraded)
        late = False
        order = family.demand.order(ways, gear)
        for number in order:
            batchers = [family.batchers[variant] for variant in ways[number].variants]
            if all(batcher.has_room(asked.terms) for batcher in batchers):
                if batchers[0].can_meet(asked.terms) and family.demand.can_wait(ways[number], asked.terms):
                    return ways[number], number
                late = True
        family.demand.turned_away(ways[order[0]])
        if late:
            self.telemetry.refused(family.name, "late")
            raise DeadlineError("no free capacity answers this before its deadline; allow more time or come back later")
        self.telemetry.refused(family.name, "overloaded")
        full = [family.batchers[v] for v in ways[order[-1]].variants if not family.batchers[v].has_room(asked.terms)]
        raise min((batcher.overloaded(asked.terms) for batcher in full), key=lambda error: error.retry_after_s)

    def counted(self, asked: Asked) -> Telling:
        """Around the way of a request: what goes wrong there; refusals before it are counted where they are made."""
        return Telling(lambda error: self._failed(asked, error))

    def _failed(self, asked: Asked, error: FettleError) -> None:
        self.telemetry.refused(asked.family.name, "late" if isinstance(error, DeadlineError) else "failed")
        trial = self.trial_of(asked)
        if trial is not None and error.status >= 500:
            trial.failed(asked.family)

    def _only(self, kind: TaskKind | None) -> ServedFamily:
        fitting = [family for family in self.settled if kind in (None, family.task.kind)]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting and kind is not None:
            raise UnknownModelError(f"no family here does {kind.value}; there are {self._models()}", param="model")
        raise RequestError(f"name a model: one of {self._models()}", param="model")

    def _models(self) -> str:
        return ", ".join(model for family in self.families.values() for model in family.models)


def _timed(work: Callable[[], list[Row]]) -> Tokenized:
    started = time.perf_counter()
    rows = work()
    return Tokenized(rows, (time.perf_counter() - started) * 1000)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
