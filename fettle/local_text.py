"""Text without a server: `fettle.load(family).generate(prompts)` for families that generate.

The choice of the operating point, the early stops, the scores and what is taken are the service's, from the same
functions, so a certificate means the same here. All prompts of a call share the slots of one generator a variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fettle.chat import Chat, ChatTemplate, Message
from fettle.detokenize import TextStream
from fettle.errors import DataError, FettleError, UsageError
from fettle.extract import Extract, FunctionAnswer, extractor
from fettle.family import Family
from fettle.findings import OperatingPoint, StopGates
from fettle.findings import Step as PointStep
from fettle.generation import Finish, Prompt, Sampling, Step, Token
from fettle.instruction import Instruction
from fettle.points import choose_point, whole
from fettle.promise import EXACT, Bound, Tolerance, share
from fettle.stopping import Watch, takes, wants_end, wants_logprobs, watch_step
from fettle.text_scores import score_of, tally
from fettle.tokenizer import Tokenizer

Ids = NDArray[np.int32]
# A prompt as it stands, a conversation, or token ids.
GivenPrompt = str | Sequence[Message] | Ids
# A detokenizer looks no further back in the prompt than this.
BEFORE = 32


class Generates(Protocol):
    """What is asked of a generator (`workers.generator.Generator` has it)."""

    @property
    def context(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    def submit(self, prompt: Prompt) -> None: ...
    def cancel(self, id: str) -> bool: ...
    def step(self) -> list[Step]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt's text, and how it came about.

    `answer` is what the family compares, read from the text; None where the text has none in it, or the family says
    nothing of answers. `tokens` were drawn by all attempts, end tokens included. `score` in [0, 1] is how sure the text
    is, where its step has a score. `bound` is "exact" where the reference itself answered and None without a promise.
    """

    text: str
    answer: str | None
    finish: Finish
    tokens: int
    score: float | None
    point: str | None
    variant: str
    step: int
    bound: Bound | Literal["exact"] | None


class LocalTexts:
    """An opened family with its generators. Made by `fettle.load`; close it, or use it in a `with` block."""

    def __init__(self, family: Family, open_generator: Callable[[str], Generates]) -> None:
        task = family.manifest.task
        self.family = family
        self._open = open_generator
        self._tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
        template = ChatTemplate.read(family.tokenizer_path.parent)
        self._chat = None if template is None else Chat(template)
        self._instruction = None if task.instruction is None else Instruction(task.instruction)
        # A function of the user's belongs to whoever optimizes; a family's own files name no code.
        known = task.answer is not None and not isinstance(task.answer, FunctionAnswer)
        self._extract: Extract | None = extractor(task.answer) if known and task.answer is not None else None
        self._generators: dict[str, Generates] = {}
        self._closed = False
        # A generator steps one call at a time.
        self._turn = Lock()

    def __enter__(self) -> LocalTexts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def points(self) -> Sequence[OperatingPoint]:
        return self.family.manifest.points

    def generate(
        self,
        prompts: Sequence[GivenPrompt],
        max_disagreement: Tolerance = 0.01,
        *,
        variant: str | None = None,
        max_tokens: int | None = None,
    ) -> list[Generation]:
        """The greedy text for each prompt, in their order.

        Args:
            prompts: strings are continued as they stand; conversations by the model's chat template.
            max_disagreement: the share of answers that may differ from the reference's. The cheapest operating point
                certified at it answers, and the reference where there is none; "exact" or 0 for the reference;
                None for the family's default variant, without a promise.
            variant: this variant answers, to its own end and without a promise.
            max_tokens: of a text, at most; as long as those that were certified if None.

        Raises:
            UsageError: a prompt is none, the tolerance no share, or the family was closed.
            RequestError: a prompt is empty or too long.
            FamilyError: no such variant.
            IntegrityError: a model file was changed.
            EngineError: the runtime failed.
        """
        ids = [self._ids(prompt, index) for index, prompt in enumerate(prompts)]
        way = self._way(max_disagreement, variant)
        with self._turn:
            if self._closed:
                raise UsageError("this family was closed; open it again with fettle.load")
            return self._walk(ids, way, max_tokens or self._longest())

    def predict(
        self, texts: Sequence[GivenPrompt], max_disagreement: Tolerance = 0.01, *, variant: str | None = None
    ) -> list[Generation]:
        """The same for texts as the data had them: what the family asks of a text becomes the prompt."""
        return self.generate([self._asked(text) for text in texts], max_disagreement, variant=variant)

    def read(self, content: Mapping[str, Any]) -> GivenPrompt:
        """A row as the data had it (columns of the instruction, `messages`, `prompt` or `text`), as a prompt.

        Raises:
            DataError: it has none of these.
        """
        messages, prompt = content.get("messages"), content.get("prompt")
        if self._instruction is not None:
            missing = [name for name in self._instruction.columns if not isinstance(content.get(name), str)]
            if missing:
                raise DataError(f'must be an object with a string "{missing[0]}"')
            return self._message(self._instruction.fill(content))
        if isinstance(messages, list) and messages:
            return messages
        found = prompt if isinstance(prompt, str) else content.get("text")
        if not isinstance(found, str):
            raise DataError('must be an object with "messages", or a string "prompt" or "text"')
        return found

    def close(self) -> None:
        """Free the models; a second time does nothing."""
        with self._turn:
            self._closed = True
            while self._generators:
                self._generators.popitem()[1].close()

    # Prompts.

    def _asked(self, text: GivenPrompt) -> GivenPrompt:
        return self.read({"text": text}) if isinstance(text, str) and self._instruction is not None else text

    def _message(self, text: str) -> GivenPrompt:
        return text if self._chat is None else [{"role": "user", "content": text}]

    def _ids(self, prompt: GivenPrompt, index: int) -> Ids:
        if isinstance(prompt, np.ndarray):
            return prompt.astype(np.int32)
        if isinstance(prompt, str):
            return self._tokenizer.ids(prompt, special=True)
        messages = (
            [message for message in prompt if isinstance(message, Mapping)] if isinstance(prompt, Sequence) else []
        )
        if not messages or len(messages) < len(prompt):
            raise UsageError(f"prompt {index} is {type(prompt).__name__}; give a string or messages", param="prompts")
        if self._chat is None:
            raise UsageError("this model has no chat template; give prompts as strings", param="prompts")
        return self._tokenizer.ids(self._chat.render(messages), special=False)

    # Ways.

    def _way(self, max_disagreement: Tolerance, variant: str | None) -> _Way:
        manifest = self.family.manifest
        if variant is None and max_disagreement is not None:
            point = choose_point(self.points, share(max_disagreement))
            if point is not None:
                found = point.certificate
                return _Way(point.steps, point.id, Bound(found.alpha, found.delta, found.upper_bound))
            variant = manifest.reference
        name = variant or manifest.default
        return _Way(whole(self.family.variant(name)), None, EXACT if name == manifest.reference else None)

    def _longest(self) -> int:
        measured = self.family.variant(self.family.manifest.reference).measured
        text = None if measured is None else measured.quality.text
        return self.family.manifest.tokenizer.max_length if text is None else text.max_tokens

    def _walk(self, prompts: Sequence[Ids], way: _Way, max_tokens: int) -> list[Generation]:
        done: dict[int, Generation] = {}
        drawn = [0] * len(prompts)
        for number, step in enumerate(way.steps):
            last = number == len(way.steps) - 1
            left = [row for row in range(len(prompts)) if row not in done]
            texts = self._attempts([prompts[row] for row in left], step, max_tokens, last=last)
            for row, attempt in zip(left, texts, strict=True):
                drawn[row] += attempt.drawn
                assert attempt.finish is not None
                if takes(attempt.finish, attempt.score, step, last=last):
                    done[row] = self._told(attempt, drawn[row], way, number)
        return [done[row] for row in range(len(prompts))]

    def _told(self, attempt: Attempt, drawn: int, way: _Way, number: int) -> Generation:
        found = None if self._extract is None else self._extract(attempt.text)
        assert attempt.finish is not None
        return Generation(
            text=attempt.text,
            answer=found.value if found is not None and found.found else None,
            finish=attempt.finish,
            tokens=drawn,
            score=None if math.isnan(attempt.score) else attempt.score,
            point=way.point,
            variant=way.steps[number].variant,
            step=number,
            bound=way.bound,
        )

    def _attempts(self, prompts: Sequence[Ids], step: PointStep, max_tokens: int, *, last: bool) -> list[Attempt]:
        """One step's texts. Whatever fails, nothing of it stays with the generator."""
        generator = self._generator(step.variant)
        gates = step.text or StopGates()
        sampling = Sampling(temperature=0.0, logprobs=0 if wants_logprobs(gates) else None)
        ends = frozenset(self.family.manifest.task.end_ids)
        attempts: dict[str, Attempt] = {}
        try:
            for number, ids in enumerate(prompts):
                before = ids[-BEFORE:].tolist()
                streams = [self._tokenizer.detokenizer.stream(before=before) for _ in range(2)]
                watch = watch_step(step, streams[0].push, self._extract, last=last)
                attempts[str(number)] = Attempt(step, streams[1], watch)
                prompt = Prompt(
                    id=str(number),
                    ids=ids,
                    max_tokens=max(1, min(max_tokens, generator.context - len(ids))),
                    sampling=sampling,
                    end_ids=ends,
                    watch=None if watch is None else watch.see,
                    want_end=wants_end(gates),
                )
                generator.submit(prompt)
            while generator.busy:
                for told in generator.step():
                    attempts[told.id].add(told)
        except FettleError:
            for name in attempts:
                generator.cancel(name)
            raise
        return list(attempts.values())

    def _generator(self, variant: str) -> Generates:
        if variant not in self._generators:
            self._generators[variant] = self._open(variant)
        return self._generators[variant]


@dataclass(frozen=True, slots=True)
class _Way:
    """How a call is answered: the steps, and what is promised of them."""

    steps: Sequence[PointStep]
    point: str | None
    bound: Bound | Literal["exact"] | None


@dataclass
class Attempt:
    """One step's text as it comes, and what was made of it once it is over.

    `drawn` tokens were paid for; `score` is NaN where the step has none.
    """

    step: PointStep
    stream: TextStream
    watch: Watch | None
    text: str = ""
    finish: Finish | None = None
    drawn: int = 0
    score: float = math.nan
    _tokens: list[Token] = field(default_factory=list)

    def add(self, told: Step) -> None:
        """Raises FettleError, what the engine says, where the generation failed."""
        if told.error is not None:
            raise told.error
        self._tokens += told.tokens
        if told.finish is None:
            return
        self.finish = told.finish
        self.drawn = len(self._tokens) + (told.end is not None)
        early = self.watch is not None and self.watch.finish is told.finish
        kept = self._tokens[: self.watch.kept] if early and self.watch is not None else self._tokens
        self.text = "".join(self.stream.push(token.id) for token in kept)
        if not told.finish.early:
            self.text += self.stream.finish()
        score = None if self.step.text is None else self.step.text.score
        if score is not None:
            ended = self._tokens[-1].end if told.finish is Finish.EARLY_END else math.nan
            end = ended if told.end is None else told.end.end
            self.score = score_of(score, tally((token.logprob for token in kept), end))
