"""Continuous batching: many generations over one runner, a step at a time.

A step feeds a piece of the next prompt, then lets every generation that is alive take one token, so that long prompts
do not stall running streams. Room follows from the memory that was given: slots grow longer, and fewer, as their tokens
need it; what no longer fits gives up its slot and is fed again later. No generation's tokens depend on the others, on
their order or on that. Which slot is whose is `workers/slots.py`'s; knows no tokenizer and no limit of a queue.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from fettle.errors import EngineError, FettleError, RequestError
from fettle.generation import Finish, Prompt, Step, Token
from fettle.sampling import Draw, Outcome, Sampler
from workers.decoder import Floats, Runner
from workers.slots import SHORTEST_PIECE, Copy, Sequence, Slots
from workers.speculation import Speculation

# Prompt tokens between two decode steps: more would stall the streams, fewer waste the matrix products.
CHUNK = 128
# Where no stream waits; cancellations are looked at in between.
ALONE_CHUNK = 512


@dataclass(slots=True)
class GeneratorStats:
    """Counters since the start, times in seconds."""

    prompts: int = 0
    fed_tokens: int = 0
    reused_tokens: int = 0
    feed_s: float = 0.0
    decode_steps: int = 0
    decode_rows: int = 0
    decode_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0


@dataclass(slots=True)
class Generator:
    """See the module. Not thread-safe.

    Args:
        memory_bytes: for keys and values.
        max_slots: generations that decode together, at most.
        chunk: prompt tokens of a step, while others decode.
        speculation: drafts tokens for generations that decode alone; None for no such thing. Sampled texts, whose
            tokens are harder to guess, have its like for themselves, with the same drafters.
    """

    runner: Runner
    memory_bytes: int
    max_slots: int = 32
    chunk: int = CHUNK
    speculation: Speculation | None = None
    stats: GeneratorStats = field(default_factory=GeneratorStats)
    _slots: Slots = field(init=False)
    _sampler: Sampler = field(init=False)
    _sampled_speculation: Speculation | None = field(init=False)
    _sequences: dict[str, Sequence] = field(default_factory=dict)
    _submitted: int = 0

    def __post_init__(self) -> None:
        """Raises EngineError: the memory does not hold one slot."""
        spec = self.runner.manifest.decoder
        assert spec is not None
        tokens = self.memory_bytes // self.runner.bytes_per_token
        if tokens < 2:
            raise EngineError(f"{self.memory_bytes} bytes hold no keys and values; give at least some megabytes")
        self._slots = Slots(tokens, min(tokens, spec.context), self.max_slots)
        self._sampler = Sampler(self.runner.manifest.task.width)
        self._sampled_speculation = None if self.speculation is None else Speculation(self.speculation.drafters)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its output together, at most."""
        return self._slots.longest

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    @property
    def alive(self) -> int:
        """Generations that have a slot."""
        return self._slots.held

    @property
    def waiting(self) -> int:
        return len(self._slots.waiting)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held for generations under way."""
        return self._slots.used

    @property
    def cache_size(self) -> int:
        """Tokens that the memory holds."""
        return self._slots.tokens

    @property
    def free_slots(self) -> int:
        return self._slots.count - self._slots.held

    def submit(self, prompt: Prompt) -> None:
        """Let a generation begin when there is room.

        Raises:
            RequestError: the prompt is empty, has unknown tokens, or leaves no room for output.
        """
        vocabulary = self.runner.manifest.task.width
        if not len(prompt.ids) or prompt.ids.min() < 0 or prompt.ids.max() >= vocabulary:
            raise RequestError(f"a prompt is at least one token of 0 to {vocabulary - 1}", param="prompt")
        if len(prompt.ids) + len(prompt.given) >= self.context:
            raise RequestError(
                f"the prompt has {len(prompt.ids)} tokens, and prompt and output together may have {self.context}; "
                "shorten it",
                param="prompt",
            )
        if prompt.id in self._sequences:
            raise RequestError(f"a generation {prompt.id!r} is under way already", param="id")
        sequence = Sequence(prompt, Draw(prompt, vocabulary), self._submitted, self.context)
        for token in prompt.given:
            sequence.draw.take(token)
            sequence.append(token)
        self._submitted += 1
        self.stats.prompts += 1
        self._sequences[prompt.id] = sequence
        self._slots.wait(sequence)

    def cancel(self, id: str) -> bool:
        """End a generation between two steps, without a word; whether there was one."""
        sequence = self._sequences.get(id)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    def step(self) -> list[Step]:
        """One piece of a prompt and one token for each that is alive; what came of it."""
        steps = self._feed() if self._next_prompt() else []
        steps += self._decode()
        return steps

    def close(self) -> None:
        self.runner.close()

    # Room.

    def _next_prompt(self) -> bool:
        """Whether a prompt is being fed, or can begin to be."""
        slots = self._slots
        if slots.filling is not None or not slots.waiting:
            return slots.filling is not None
        sequence = slots.waiting[0]
        if not self._make_room(sequence):
            return False
        slots.waiting.pop(0)
        self._copy(slots.place(sequence))
        sequence.cached = sequence.fed if not sequence.told else sequence.cached
        self.stats.reused_tokens += sequence.fed
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """A slot for one more, from one that is less urgent if need be."""
        slots = self._slots
        count, context = self._shape(sequence.length + 1)
        while slots.held >= count:
            victim = slots.victim() if slots.held else None
            if victim is None or victim.prompt.priority <= sequence.prompt.priority:
                return False
            self._preempt(victim)
            count, context = self._shape(sequence.length + 1)
        self._reshape(count, context)
        return True

    def _shape(self, tokens: int) -> tuple[int, int]:
        """For those who have a slot, with their next token, and one of so many tokens more."""
        slots = self._slots
        held = [*slots.alive, *([slots.filling] if slots.filling else [])]
        return slots.shape_for([tokens, *(sequence.length + 1 for sequence in held)])

    def _reshape(self, count: int, context: int) -> None:
        slots = self._slots
        # A shape that has room stays: to change it copies everything.
        if slots.count > slots.held and slots.context >= context:
            return
        self._copy(slots.gather(count))
        self.runner.allocate(count, context)
        slots.reshape(count, context)

    def _grow(self) -> None:
        """Longer slots, where the next token needs it; fewer, if the memory says so."""
        slots = self._slots
        while True:
            count, context = self._shape(0)
            if context <= slots.context:
                return
            if slots.held <= count:
                self._copy(slots.gather(count))
                self.runner.allocate(count, context)
                slots.reshape(count, context)
                return
            self._preempt(slots.victim())

    def _preempt(self, sequence: Sequence) -> None:
        self._copy(self._slots.leave(sequence))
        sequence.fed = sequence.filled = 0
        self._slots.wait(sequence)
        self.stats.preempted += 1

    def _copy(self, copy: Copy | None) -> None:
        if copy is not None:
            self.runner.copy(copy.source, copy.target, copy.length)

    # Prompts.

    def _feed(self) -> list[Step]:
        sequence = self._slots.filling
        assert sequence is not None
        begin = sequence.fed
        end = begin + max(SHORTEST_PIECE, self.chunk if self._slots.alive else max(self.chunk, ALONE_CHUNK))
        if end + SHORTEST_PIECE > sequence.length:
            end = sequence.length
        whole = sequence.prompt.prompt_logprobs and not sequence.told
        wanted = end - begin if whole else int(end == sequence.length)
        started = time.perf_counter()
        try:
            logits = self.runner.feed(self._slots.filling_at, sequence.tokens[begin:end], begin, wanted)
            if whole:
                self._score(sequence, logits, begin, end)
        except EngineError as error:
            return [self._failed(sequence, error)]
        self.stats.feed_s += time.perf_counter() - started
        self.stats.fed_tokens += end - begin
        sequence.fed = sequence.filled = end
        if end < sequence.length:
            return []
        self._copy(self._slots.join())
        return [self._sampled(sequence, logits[-1:])]

    def _score(self, sequence: Sequence, logits: Floats, begin: int, end: int) -> None:
        """What the prompt's own tokens were given, from the logits before each."""
        if not begin:
            sequence.scored.append(Token(int(sequence.tokens[0])))
        following = sequence.tokens[begin + 1 : end + 1]
        top = sequence.prompt.sampling.logprobs or 0
        sequence.scored += self._sampler.score(logits[: len(following)], following, top)

    # Output.

    def _decode(self) -> list[Step]:
        self._grow()
        alive = list(self._slots.alive)
        if not alive:
            return []
        speculation = self._speculation_for(alive)
        if speculation is not None:
            drafted = self._verify(alive[0], speculation)
            if drafted is not None:
                return drafted
        started = time.perf_counter()
        ids = np.array([sequence.tokens[-1] for sequence in alive], np.int32)
        try:
            logits = self.runner.decode(ids, np.array([sequence.fed for sequence in alive], np.int32))
        except EngineError as error:
            return self._one_by_one(alive, error)
        took = time.perf_counter() - started
        self.stats.decode_s += took
        self.stats.decode_steps += 1
        self.stats.decode_rows += len(alive)
        if speculation is not None:
            speculation.decoded(took)
        for sequence in alive:
            sequence.fed += 1
        outcomes = self._sampler.sample(logits, [sequence.draw for sequence in alive])
        return [self._told(each, outcome) for each, outcome in zip(alive, outcomes, strict=True)]

    def _speculation_for(self, alive: Items[Sequence]) -> Speculation | None:
        if len(alive) != 1:
            return None
        return self.speculation if alive[0].prompt.sampling.greedy else self._sampled_speculation

    def _one_by_one(self, alive: Items[Sequence], error: EngineError) -> list[Step]:
        """One row may have been at fault, so that each tries alone; of one, it was."""
        if len(alive) == 1:
            return [self._failed(alive[0], error)]
        steps = []
        for sequence in alive:
            slot = self._slots.alive.index(sequence)
            try:
                logits = self.runner.feed(slot, sequence.tokens[-1:], sequence.fed, 1)
            except EngineError as own:
                steps.append(self._failed(sequence, own))
                continue
            sequence.fed += 1
            steps.append(self._sampled(sequence, logits))
        return steps

    def _verify(self, sequence: Sequence, speculation: Speculation) -> list[Step] | None:
        """Several tokens at once, where those that were guessed are the ones that would have been drawn; None for none.

        Each is drawn from its own logits as ever, and a guess only decides whether the next logits hold: so the text is
        the same, whoever guessed.
        """
        room = min(self._slots.context, self.context) - sequence.fed - 1
        left = sequence.prompt.max_tokens - sequence.generated
        started = time.perf_counter()
        guess = speculation.propose(sequence.tokens, min(room, left - 1))
        if not len(guess):
            return None
        fed = np.concatenate([sequence.tokens[-1:], guess])
        try:
            logits = self.runner.feed(0, fed, sequence.fed, len(fed))
        except EngineError as error:
            return [self._failed(sequence, error)]
        took = time.perf_counter() - started
        steps: list[Step] = []
        for row in range(len(fed)):
            sequence.fed += 1
            steps.append(self._sampled(sequence, logits[row : row + 1]))
            if steps[-1].over or row == len(guess) or sequence.tokens[-1] != guess[row]:
                break
        speculation.verified(len(steps) - 1, took)
        self.stats.decode_s += took
        self.stats.decode_steps += 1
        self.stats.decode_rows += len(steps)
        self.stats.drafted += len(guess)
        self.stats.accepted += len(steps) - 1
        return [_joined(steps)]

    def _sampled(self, sequence: Sequence, logits: Floats) -> Step:
        (outcome,) = self._sampler.sample(logits, [sequence.draw])
        return self._told(sequence, outcome)

    def _told(self, sequence: Sequence, outcome: Outcome) -> Step:
        """The outcome of a step, as the world sees it."""
        if isinstance(outcome, FettleError):
            return self._failed(sequence, outcome)
        prompt, cached = None, 0
        if not sequence.told:
            sequence.told = True
            prompt = tuple(sequence.scored) if sequence.prompt.prompt_logprobs else None
            cached = sequence.cached
        try:
            tokens, finish = self._taken(sequence, outcome)
        except FettleError as error:
            return self._failed(sequence, error)
        if finish is not None:
            self._end(sequence)
        end = outcome if finish is Finish.STOP and not tokens and isinstance(outcome, Token) else None
        return Step(sequence.prompt.id, tokens, finish, end, cached=cached, prompt=prompt)

    def _taken(self, sequence: Sequence, outcome: Token | Finish) -> tuple[tuple[Token, ...], Finish | None]:
        if isinstance(outcome, Finish):
            return (), outcome
        if outcome.id in sequence.prompt.end_ids:
            return (), Finish.STOP
        sequence.draw.take(outcome.id)
        sequence.append(outcome.id)
        finish = sequence.prompt.watch((outcome,)) if sequence.prompt.watch is not None else None
        if finish is None and sequence.generated >= sequence.prompt.max_tokens:
            finish = Finish.LENGTH
        if finish is None and sequence.length >= self.context:
            finish = Finish.CONTEXT
        return (outcome,), finish

    def _failed(self, sequence: Sequence, error: FettleError) -> Step:
        self._end(sequence)
        return Step(sequence.prompt.id, (), error=error)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.prompt.id]
        self._copy(self._slots.leave(sequence))


def _joined(steps: Items[Step]) -> Step:
    """Steps of one generation as one."""
    last = steps[-1]
    return Step(
        last.id,
        tuple(token for step in steps for token in step.tokens),
        last.finish,
        last.end,
        last.error,
        sum(step.cached for step in steps),
        next((step.prompt for step in steps if step.prompt is not None), None),
    )
