"""The replica of a text variant: a `TextEngine` behind a Serve deployment, a streaming call for each client's call."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from ray import serve
from ray.serve.handle import DeploymentHandle
from tokenizers import Tokenizer as FastTokenizer

from deployments.text_engine import TextEngine
from deployments.text_rules import TextRules
from deployments.text_work import Bit, TextWork
from deployments.text_writer import extract_of
from deployments.variant import losses
from fettle.config import TextConfig
from fettle.detokenize import Detokenizer
from fettle.errors import FettleError
from fettle.manifest import Precision
from workers.engine import EngineOptions, open_runner
from workers.generator import Generator
from workers.speculation import PromptLookup, Speculation


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What a replica needs beside its variant's files."""

    engine: EngineOptions
    text: TextConfig
    tokenizer: str
    niceness: int = 0


@serve.deployment
class TextVariant:
    """Owns one loaded variant, whose generator works on a thread of its own."""

    def __init__(self, directory: str, options: TextOptions) -> None:
        # Of this thread and those that it starts, the engine's among them.
        os.nice(options.niceness)
        runner = open_runner(Path(directory), options.engine)
        runner.warm_up()
        text, precision = options.text, runner.manifest.precision
        generator = Generator(
            runner,
            text.cache_bytes,
            max_slots=text.slots,
            chunk=text.chunk_tokens,
            # In lower precisions several tokens at once differ from one by one by more than the last digits.
            speculation=Speculation(PromptLookup()) if text.lookup and precision is Precision.FP32 else None,
        )
        fast = FastTokenizer.from_file(options.tokenizer)
        task = runner.manifest.task
        rules = TextRules(options.tokenizer, fast, task)
        self.engine = TextEngine(generator, Detokenizer(fast), rules, extract_of(task))
        self._started = False
        # What was allocated so far lives as long as the replica: collecting it again and again is wasted time.
        gc.collect()
        gc.freeze()

    async def generate(self, work: TextWork) -> AsyncIterator[list[Bit]]:
        """The work's bits; what is wrong with it is one too, so that every exception means: this replica is gone."""
        if not self._started:
            self._started = True
            self.engine.start()
        try:
            async for bits in self.engine.generate(work):
                yield bits
        except FettleError as error:
            yield [Bit(number, error=error) for number in work.answers]

    def check_health(self) -> None:
        if self._started:
            self.engine.check()


class ReplicaStreams:
    """The lane's `Replicas`: calls over Serve's handle, which picks the replica with the fewest under way."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.replicas = 0
        self._handle = handle.options(stream=True)

    def resize(self, replicas: int) -> None:
        """Tell how many replicas are running now."""
        self.replicas = replicas

    async def generate(self, work: TextWork) -> AsyncGenerator[list[Bit], None]:
        with losses():
            stream = self._handle.generate.remote(work)
        try:
            with losses():
                async for bits in stream:
                    yield bits
        finally:
            stream.cancel()
