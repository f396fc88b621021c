"""The router's way with text: which variant or operating point answers a call, and its bits as pieces of a reply.

Certificates for text are about one greedy answer to a prompt. So a call in a class that is sampled, wants several
choices, or has rules of its own for when to stop, is the reference's; a variant that was named answers anything.
An attempt that another step may replace is kept back until it is taken; streams go by a way of one step where there is
one.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace

from deployments.bounds import Holding, is_retried
from deployments.lane import Lane
from deployments.router import Router
from deployments.telemetry import Generated
from deployments.text_engine import seeded
from deployments.text_source import Answering, Piece, Spent, TextCall, Votes
from deployments.text_work import Bit, TextWork, merged
from deployments.tickets import Terms
from deployments.watch import Comparison
from fettle.errors import FettleError, RequestError
from fettle.manifest import Step, VotePoint
from fettle.menu import Way
from fettle.stopping import takes
from fettle.votes import certified


@dataclass(slots=True)
class TextRouter:
    """The API's `TextSource`."""

    router: Router

    async def open(self, call: TextCall) -> AsyncGenerator[Piece, None]:
        """See `TextSource.open`."""
        family = call.asked.family
        if call.vote and family.task.answer is None:
            raise RequestError(
                f"answers: family {family.name!r} does not say what the answer in a text is, so none can be voted on; "
                "optimize it with --answer",
                param="answers",
            )
        if call.asked.terms.trace is not None:
            call.asked.terms.trace.tokenized(call.tokenize_ms)
        await self.router.watch.informed()
        with Holding(call.asked.client.limits, sum(map(len, call.prompts))):
            begun = False
            try:
                async with aclosing(self._answer(call)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                return
            except FettleError as error:
                old = call.asked.of_old_version()
                if begun or old is None or not is_retried(error):
                    raise
            async with aclosing(self._answer(replace(call, asked=old))) as pieces:
                async for piece in pieces:
                    yield piece

    async def _answer(self, call: TextCall) -> AsyncGenerator[Piece, None]:
        trial = self.router.trial_of(call.asked)
        # Drawn before anything is known of the way or the load, so that neither decides what is looked at.
        sample = self.router.watch.draw(len(call.prompts))
        compared = trial.sample(len(call.prompts)) if trial is not None and call.asked.family is trial.new else []
        with self.router.counted(call.asked):
            way, gear = self._choose(call)
            call.asked.family.demand.text_comes(way, _predicted_ms(call, way))
            told = _Told(call, way, gear, vote_of(call))
            try:
                async with aclosing(self._bits(call, way, told)) as bits:
                    async for some in bits:
                        for piece in told.pieces(some):
                            yield piece
            finally:
                self._count(call, way, told)
            if is_certified_kind(call):
                self._watch(call, way, told, sample)
                if trial is not None:
                    old = replace(call, asked=call.asked.instead or call.asked)
                    for comparison in self._comparisons(old, told, compared):
                        trial.compare_later(way, comparison)

    def _choose(self, call: TextCall) -> tuple[Way, int]:
        asked = call.asked
        if asked.quality.variant is not None or not asked.family.family.manifest.points:
            return self.router.choose(asked)
        if not is_certified_kind(call):
            return self.router.choose(asked, only=[asked.family.menu.reference()])
        ways = [way for way in self.router.ways(asked) if len(way.stretches) == 1] if call.stream else []
        return self.router.choose(asked, only=ways or None)

    async def _bits(self, call: TextCall, way: Way, told: _Told) -> AsyncGenerator[list[Bit], None]:
        """The bits of the attempt that is taken."""
        family = call.asked.family
        for number, stretch in enumerate(way.stretches):
            last = number == len(way.stretches) - 1
            lane = family.batchers[stretch.step.variant]
            assert isinstance(lane, Lane)
            work = work_of(call, stretch.step, last=last, vote=told.vote)
            told.begins(stretch.step.variant, number)
            with told.traced() as parent:
                if parent is not None:
                    work = replace(work, trace=parent)
                attempted = lane.generate(work, call.asked.terms, admitted=number > 0, begun=told.turn)
                async with aclosing(attempted) as attempt:
                    if last:
                        async for bits in attempt:
                            yield bits
                        return
                    whole = merged([bit async for bits in attempt for bit in bits])
            taken = all(_taken(bit, stretch.step) for bit in whole)
            family.demand.passed(way, number, 1, int(not taken))
            if taken:
                yield whole
                return
            told.gives_up(whole)

    def _watch(self, call: TextCall, way: Way, told: _Told, sample: Sequence[int]) -> None:
        """Note where the texts were answered, and compare those that were drawn with the reference's."""
        family, watch = call.asked.family, self.router.watch
        for prompt in range(len(call.prompts)):
            watch.note(family, way, told.step, 0, told.scores.get(prompt, math.nan))
        for comparison in self._comparisons(call, told, sample):
            watch.compare_later(family, call.asked.quality, way, comparison)

    def _comparisons(self, call: TextCall, told: _Told, sample: Sequence[int]) -> Iterator[Comparison[str]]:
        """Of the texts that were told, with what the call's family writes."""
        if (extract := call.asked.family.extract) is None:
            return

        def differs(text: str, truth: str) -> bool:
            return extract(text) != extract(truth)

        for prompt in sample:
            one = replace(call, prompts=(call.prompts[prompt],), stream=False)

            async def ask(other: Way, terms: Terms, one: TextCall = one) -> str:
                again = replace(one, id=uuid.uuid4().hex, asked=replace(one.asked, terms=terms))
                asked = _Told(again, other, 0)
                async with aclosing(self._bits(again, other, asked)) as bits:
                    return "".join([piece.text async for some in bits for piece in asked.pieces(some)])

            yield Comparison(told.texts[prompt], ask, differs)

    def _count(self, call: TextCall, way: Way, told: _Told) -> None:
        call.asked.client.limits.generated(told.tokens)
        if not told.done:
            return
        family, now = call.asked.family, time.monotonic()
        self.router.telemetry.answered(
            family.name,
            family.level_name(call.asked.quality),
            way.name,
            [(told.variant, 0)] * call.answers,
            tokenize_ms=call.tokenize_ms,
            queue_ms=told.queue_ms,
            infer_ms=told.infer_ms,
            total_ms=(now - call.asked.terms.arrived) * 1000,
            tokens=sum(map(len, call.prompts)),
        )
        self.router.telemetry.generated(family.name, told.made)
        trial = self.router.trial_of(call.asked)
        if trial is not None:
            trial.answered(family, (now - call.asked.terms.arrived) * 1000)


def is_certified_kind(call: TextCall) -> bool:
    """Whether certificates are about this call: one greedy text that nothing but the model ends."""
    sampling = call.sampling
    plain = (
        sampling.greedy
        and not sampling.logit_bias
        and sampling.repetition_penalty == 1.0
        and not (sampling.presence_penalty or sampling.frequency_penalty)
    )
    return plain and call.choices == 1 and not _has_own_rules(call)


def vote_of(call: TextCall) -> VotePoint | None:
    """The certified way to end the call's vote; None for a vote that ends where nothing can change, or for no vote."""
    if not call.vote or call.asked.quality.variant is not None or _has_own_rules(call):
        return None
    points = call.asked.family.family.manifest.votes
    return certified(points, call.asked.quality.tolerance, call.sampling, call.choices)


def _has_own_rules(call: TextCall) -> bool:
    """Whether something that the client said, and not the model, may end or bend a text."""
    own = (call.stop, call.stop_ids, call.ignore_end, call.min_tokens, call.grammar, call.early_stop)
    return any(own)


def work_of(call: TextCall, step: Step, *, last: bool, vote: VotePoint | None = None) -> TextWork:
    """What a replica of the step's variant has to do for the call."""
    family = call.asked.family
    ends = frozenset() if call.ignore_end else frozenset(family.task.end_ids)
    context = family.context
    room = [context - len(ids) for ids in call.prompts]
    return TextWork(
        id=call.id,
        prompts=call.prompts,
        sampling=seeded(call.sampling),
        max_tokens=tuple(left if call.max_tokens is None else min(left, call.max_tokens) for left in room),
        choices=call.choices,
        min_tokens=call.min_tokens,
        end_ids=ends | call.stop_ids,
        stop=call.stop,
        keep_stop=call.keep_stop,
        grammar=call.grammar,
        prompt_logprobs=call.prompt_logprobs,
        early_stop=call.early_stop,
        step=step,
        last=last,
        vote=((vote.confidence if vote else None) or 0.0) if call.vote else None,
        stream=call.stream and last,
        priority=int(call.asked.terms.priority),
    )


def _predicted_ms(call: TextCall, way: Way) -> list[float]:
    """What the call takes at each variant of the way, if it gets there."""
    lanes = [call.asked.family.batchers[variant] for variant in way.variants]
    work = work_of(call, way.stretches[0].step, last=True)
    return [lane.predicted_ms(work) for lane in lanes if isinstance(lane, Lane)]


def _taken(bit: Bit, step: Step) -> bool:
    return bit.finish is not None and takes(bit.finish, bit.score, step, last=False)


@dataclass(slots=True)
class _Told:
    """What the reply has had so far, and what it cost."""

    call: TextCall
    way: Way
    gear: int
    vote: VotePoint | None = None
    variant: str = ""
    step: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    queue_ms: float = 0.0
    infer_ms: float = 0.0
    done: bool = False
    _turn: float | None = None
    _turned: float | None = None
    _first: bool = True
    _first_token: float | None = None
    _finishes: list[str] = field(default_factory=list)
    _given_up: list[str] = field(default_factory=list)
    tokens: int = 0
    _cached: int = 0
    _votes: dict[int, Votes] = field(default_factory=dict)
    _attempts: list[dict[str, object]] = field(default_factory=list)

    def begins(self, variant: str, step: int) -> None:
        self.variant, self.step, self._turned = variant, step, None

    def turn(self) -> None:
        """A replica has it; what comes later, such as another step's queue, counts as inference."""
        self._turned = time.monotonic()
        if self._turn is None:
            self._turn = self._turned
            self.queue_ms = max(0.0, (self._turn - self.call.asked.terms.arrived) * 1000)

    @contextmanager
    def traced(self) -> Iterator[str | None]:
        """An attempt, from its queue to its end; what its replica's span belongs to, where the call is traced."""
        trace = self.call.asked.terms.trace
        if trace is None:
            yield None
            return
        began = time.monotonic()
        with trace.step(self.variant) as step:
            try:
                yield step.parent
            finally:
                if self._turned is not None:
                    step.tell((self._turned - began) * 1000, {"choices": self.call.answers})

    def gives_up(self, attempt: Sequence[Bit]) -> None:
        """An attempt that is not taken was paid for all the same."""
        tokens = sum(len(bit.tokens) for bit in attempt)
        self.tokens += tokens
        self._given_up += [self.variant] * len(attempt)
        self._attempts.append(
            {
                "variant": self.variant,
                "tokens": tokens,
                "finish": [bit.finish for bit in attempt],
                "score": [None if math.isnan(bit.score) else round(bit.score, 6) for bit in attempt],
                "taken": False,
            }
        )

    def pieces(self, bits: Sequence[Bit]) -> Iterator[Piece]:
        """Raises what went wrong with a choice, which is the whole call's end."""
        for bit in bits:
            if bit.error is not None:
                raise bit.error
            self.tokens += len(bit.tokens)
            self._cached += bit.cached
            if bit.tokens and self._first_token is None:
                self._first_token = time.monotonic()
            if bit.finish is not None:
                self._finishes.append(bit.finish.value)
            self.texts[bit.choice] = self.texts.get(bit.choice, "") + bit.text
            if bit.over:
                self.scores[bit.choice] = bit.score
            if bit.votes is not None:
                self._votes[bit.choice] = Votes(*bit.votes)
            last = len(self._finishes) == self.call.answers
            yield Piece(
                bit.choice,
                bit.text,
                bit.tokens,
                bit.finish,
                bit.stopped_by,
                bit.prompt,
                answering=self._answering() if self._first else None,
                spent=self._spent() if last else None,
            )
            self._first = False

    @property
    def made(self) -> Generated:
        """Of a whole call. What its first token and the time between two are, only whoever reads along can tell."""
        first_ms, token_ms = None, None
        if self.call.stream and self._first_token is not None:
            first_ms = (self._first_token - self.call.asked.terms.arrived) * 1000
            if self.call.answers == 1 and self.tokens > 1:
                token_ms = (time.monotonic() - self._first_token) * 1000 / (self.tokens - 1)
        return Generated(
            self.variant,
            self._finishes,
            self.tokens,
            self._cached,
            self._given_up,
            first_ms=first_ms,
            token_ms=token_ms,
        )

    def _answering(self) -> Answering:
        asked = self.call.asked
        point, bound = None if self.way.point is None else self.way.name, self.way.bound
        if self.vote is not None and self.vote.certificate is not None:
            point, bound = self.vote.id, self.vote.certificate.upper_bound
        return Answering(
            variants=(self.variant,),
            point=point,
            bound=bound,
            gear=self.gear,
            degraded=asked.degraded and self.way.alpha > asked.quality.tolerance,
            queue_ms=self.queue_ms,
        )

    def _spent(self) -> Spent:
        assert self._turn is not None
        self.infer_ms, self.done = (time.monotonic() - self._turn) * 1000, True
        return Spent(
            self.tokens,
            self._cached,
            self.infer_ms,
            votes=tuple(self._votes[choice] for choice in sorted(self._votes)),
            explained={"attempts": self._attempts, "variant": self.variant} if self.call.asked.explain else None,
        )
