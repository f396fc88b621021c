"""A generator at work in a replica: one thread steps it, and calls are answered from the event loop, as bits of text.

Bits of a step are handed over at once; whoever reads a call gets what came since it last looked, so that a slow reader
has fewer, longer bits, and under load a quick one too. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from deployments.text_source import Ids
from deployments.text_work import Bit, TextWork, merged
from deployments.text_writer import Writer, gates_of
from fettle import stopping
from fettle.detokenize import Detokenizer
from fettle.errors import EngineError, FettleError
from fettle.extract import Extract
from fettle.generation import Constraint, Finish, Prompt, Sampling, Step
from fettle.votes import VoteRule, Votes
from workers.generator import Generator

logger = logging.getLogger("ray.serve.fettle")

# So many streams are told each token as it comes; where there are more, each waits for its next ones, the longer the
# more there are: what a piece of text costs on its way does not depend on its tokens.
PROMPT_STREAMS = 4
COALESCED_S_EACH, COALESCED_S = 0.01, 0.1


class Rules(Protocol):
    """What the tokens of a text have to keep to; see `deployments.text_rules`."""

    def constraint(self, work: TextWork, prompt: Ids) -> Constraint | None:
        """A new one for one choice. Raises RequestError for rules that cannot be kept."""
        ...


@dataclass(eq=False)
class _Call:
    """A call under way: what was not read yet, when to read on, and which generations are its own."""

    bits: list[Bit] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    running: dict[int, str] = field(default_factory=dict)


class TextEngine:
    """`start` before anything else, on the event loop that calls will be answered from; `close` in the end."""

    def __init__(
        self,
        generator: Generator,
        detokenizer: Detokenizer,
        rules: Rules,
        extract: Extract | None = None,
        watching: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`watching` is around every step."""
        self.generator = generator
        self._watching = watching
        self._detokenizer = detokenizer
        self._rules = rules
        self._extract = extract
        self._inbox: deque[Callable[[], None]] = deque()
        self._awake = threading.Event()
        self._closed = False
        self._writers: dict[str, tuple[_Call, Writer]] = {}
        self._streams = 0
        self._waiting: list[_Call] = []
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """What is under way is broken off."""
        self._closed = True
        self._awake.set()
        self._thread.join()
        self.generator.close()

    def check(self) -> None:
        """Raises EngineError if the thread is gone."""
        if not self._thread.is_alive():
            raise EngineError("the thread of the text engine has ended")

    async def generate(self, work: TextWork) -> AsyncGenerator[list[Bit], None]:
        """The work's bits, those of each choice in order; closing the iterator frees its slots within a step.

        Raises:
            RequestError: a prompt or the grammar cannot be; nothing was begun.
            EngineError: the engine is closed.
        """
        self.check()
        call = _Call()
        writers = {number: self._writer(work, number) for number in work.numbers}
        prompts = {number: self._prompt(work, number, writer) for number, writer in writers.items()}
        self._streams += 1
        try:
            if work.vote is None:
                self._begin(call, {number: (prompts[number], writers[number]) for number in work.numbers})
                async for bits in self._bits(call, work, len(prompts)):
                    yield bits
            else:
                yield await self._voted(call, work, prompts, writers)
        finally:
            self._streams -= 1
            self._do(partial(self._cancel, list(call.running.values())))

    async def _bits(self, call: _Call, work: TextWork, left: int) -> AsyncGenerator[list[Bit], None]:
        while left:
            bits = await self._news(call)
            if not work.stream:
                while sum(bit.over for bit in bits) < left:
                    bits += await self._news(call)
            left -= sum(bit.over for bit in bits)
            yield merged(bits)
            if left and self._streams > PROMPT_STREAMS:
                await self._turn_of(call)

    async def _turn_of(self, call: _Call) -> None:
        """Until it is the turn of all streams that wait: one waking of every process on the way serves them all.

        Not beyond the end of a choice, which somebody may wait for to send the next request.
        """
        call.turn.clear()
        if any(bit.over for bit in call.bits):
            return
        if not self._waiting:
            self._loop.call_later(min(COALESCED_S, COALESCED_S_EACH * self._streams), self._all_turn)
        self._waiting.append(call)
        await call.turn.wait()

    def _all_turn(self) -> None:
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call.turn.set()

    async def _voted(
        self, call: _Call, work: TextWork, prompts: dict[int, Prompt], writers: dict[int, Writer]
    ) -> list[Bit]:
        """One bit for each prompt: the text of the first choice that has the answer which won."""
        assert work.vote is not None
        rule = VoteRule(work.choices, work.vote or None)
        votes = [Votes(rule) for _ in work.prompts]
        begun = [0] * len(work.prompts)
        bits: list[Bit] = []
        while not all(each.settled for each in votes):
            for number, vote in enumerate(votes):
                more = range(number * work.choices + begun[number], number * work.choices + vote.wanted)
                begun[number] = max(begun[number], vote.wanted)
                self._begin(call, {choice: (prompts[choice], writers[choice]) for choice in more})
            for bit in await self._news(call):
                bits.append(bit)
                if bit.error is not None:
                    return [replace(bit, choice=bit.choice // work.choices)]
                if bit.over:
                    self._count(call, work, votes[bit.choice // work.choices], writers[bit.choice])
        whole = {bit.choice: bit for bit in merged(bits)}
        return [self._winner(vote, number, work, whole) for number, vote in enumerate(votes)]

    def _count(self, call: _Call, work: TextWork, vote: Votes, writer: Writer) -> None:
        """Let a text vote, and break off those that cannot change the outcome any more."""
        assert self._extract is not None
        if vote.settled:
            return
        prompt, choice = divmod(writer.choice, work.choices)
        if vote.see(choice, self._extract(writer.text)) is not None:
            needless = [number for number in call.running if number // work.choices == prompt]
            self._do(partial(self._cancel, [call.running.pop(number) for number in needless]))

    def _winner(self, vote: Votes, prompt: int, work: TextWork, whole: dict[int, Bit]) -> Bit:
        mine = [choice for choice in whole if choice // work.choices == prompt and whole[choice].over]
        # Where no text had an answer in it, the first one is as good as any.
        first = prompt * work.choices + vote.support[0] if vote.support else min(mine)
        settled_early = len(mine) < work.choices
        finish = Finish.EARLY_VOTE if settled_early else whole[first].finish
        return replace(whole[first], choice=prompt, finish=finish, votes=(len(mine), len(vote.support)))

    async def _news(self, call: _Call) -> list[Bit]:
        while not call.bits:
            call.news.clear()
            await call.news.wait()
        bits, call.bits = call.bits, []
        for bit in bits:
            if bit.over:
                call.running.pop(bit.choice, None)
        return bits

    # What is asked of the thread.

    def _writer(self, work: TextWork, number: int) -> Writer:
        return Writer(work, number, self._detokenizer, self._extract)

    def _prompt(self, work: TextWork, number: int, writer: Writer) -> Prompt:
        which, choice = divmod(number, work.choices)
        gates = gates_of(work)
        sampling = work.sampling
        if gates is not None and stopping.wants_logprobs(gates) and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)
        return Prompt(
            id=f"{work.id}/{number}",
            ids=work.prompts[which],
            max_tokens=work.max_tokens[which],
            sampling=sampling,
            end_ids=work.end_ids,
            min_tokens=work.min_tokens,
            choice=choice,
            constraint=self._rules.constraint(work, work.prompts[which]),
            watch=writer.see,
            want_end=gates is not None and stopping.wants_end(gates),
            prompt_logprobs=work.prompt_logprobs,
            priority=work.priority,
            given=work.given.get(number, ()),
        )

    def _begin(self, call: _Call, chosen: dict[int, tuple[Prompt, Writer]]) -> None:
        for number, (prompt, writer) in chosen.items():
            call.running[number] = prompt.id
            self._do(partial(self._submit, call, prompt, writer))

    def _do(self, what: Callable[[], None]) -> None:
        self._inbox.append(what)
        self._awake.set()

    # On the thread.

    def _work(self) -> None:
        while not self._closed:
            self._awake.clear()
            while self._inbox:
                self._inbox.popleft()()
            if not self.generator.busy:
                self._awake.wait()
                continue
            try:
                with self._watching():
                    steps = self.generator.step()
            except Exception as error:
                # A bug, or a device that is gone: nothing that is under way can be trusted.
                logger.exception("the text engine failed")
                steps = self._give_up(f"the engine failed: {error}")
            self._hand_over(steps)
        self._hand_over(self._give_up("the replica was closed"))

    def _submit(self, call: _Call, prompt: Prompt, writer: Writer) -> None:
        try:
            self.generator.submit(prompt)
        except FettleError as error:
            self._loop.call_soon_threadsafe(_deliver, [(call, Bit(writer.choice, error=error))])
        else:
            self._writers[prompt.id] = (call, writer)

    def _cancel(self, ids: Iterable[str]) -> None:
        for id in ids:
            if self.generator.cancel(id):
                del self._writers[id]

    def _give_up(self, why: str) -> list[Step]:
        ids = list(self._writers)
        for id in ids:
            self.generator.cancel(id)
        return [Step(id, (), error=EngineError(why)) for id in ids]

    def _hand_over(self, steps: Iterable[Step]) -> None:
        """All that a step gave in one message to the loop, which waking costs more than carrying."""
        told = []
        for step in steps:
            call, writer = self._writers.pop(step.id) if step.over else self._writers[step.id]
            told.append((call, writer.bit(step)))
        if told and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, told)


def _deliver(told: Iterable[tuple[_Call, Bit]]) -> None:
    for call, bit in told:
        call.bits.append(bit)
        call.news.set()
        if bit.over:
            call.turn.set()


def seeded(sampling: Sampling) -> Sampling:
    """With a seed, so that another replica would draw the same."""
    return sampling if sampling.seed is not None else replace(sampling, seed=secrets.randbits(63))
