"""The replica of a text variant: a `TextEngine` behind a Serve deployment, a streaming call for each client's call."""

from __future__ import annotations

import asyncio
import gc
import math
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from ray import serve
from ray.serve.handle import DeploymentHandle
from tokenizers import Tokenizer as FastTokenizer

from deployments.endpoints import Listening
from deployments.exporter import EVERY_S, Exporter
from deployments.journal import speak
from deployments.link import Link
from deployments.links import Links
from deployments.silence import Patience, next_of, told_regularly
from deployments.slots import SlotLostError
from deployments.text_engine import TextEngine
from deployments.text_metrics import tell_generator
from deployments.text_rules import TextRules
from deployments.text_work import Bit, TextWork, merged
from deployments.text_writer import extract_of
from deployments.tracing import at_replica, open_tracer
from deployments.variant import direct, losses
from deployments.watchdog import Watchdog
from deployments.wire_server import WireServer
from fettle.config import TextConfig, TracingConfig
from fettle.detokenize import Detokenizer
from fettle.errors import FettleError
from fettle.manifest import Precision, VariantManifest
from fettle.model_store import ModelStore, VariantFiles
from workers.engine import EngineOptions, open_runner
from workers.generator import Generator
from workers.speculation import Drafter, DraftModel, PromptLookup, Speculation

# Of a replica's memory for keys and values, what the draft model's one text may take, at most: one of so many parts.
DRAFT_PART = 4
WORD_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What a replica needs beside its variant's files; `draft` are those of the variant that guesses for it."""

    engine: EngineOptions
    text: TextConfig
    niceness: int = 0
    draft: VariantFiles | None = None
    stuck_after_s: float = math.inf
    wire: bool = True


@serve.deployment
class TextVariant:
    """Owns one loaded variant, whose generator works on a thread of its own."""

    def __init__(self, files: VariantFiles, options: TextOptions, tracing: TracingConfig | None = None) -> None:
        speak()
        # Of this thread and those that it starts, the engine's among them.
        os.nice(options.niceness)
        runner = files.load(lambda directory: open_runner(directory, options.engine))
        runner.warm_up()
        text = options.text
        drafters, cache_bytes = _drafters(runner.manifest, options)
        generator = Generator(
            runner,
            cache_bytes,
            max_slots=text.slots,
            chunk=text.chunk_tokens,
            speculation=Speculation(drafters) if drafters else None,
        )
        tokenizer = str(ModelStore(files.store).family(files.path).tokenizer_path)
        fast = FastTokenizer.from_file(tokenizer)
        task = runner.manifest.task
        rules = TextRules(tokenizer, fast, task)
        self._watchdog = Watchdog(options.stuck_after_s)
        if options.stuck_after_s < math.inf:
            self._watchdog.start()
        self.engine = TextEngine(generator, Detokenizer(fast), rules, extract_of(task), self._watchdog.watching)
        self._started = False
        self._name = runner.manifest.id
        self._tracer = open_tracer(tracing or TracingConfig())
        self._wire = Listening(WireServer(streams={"generate": self.written}) if options.wire else None)
        # What was allocated so far lives as long as the replica: collecting it again and again is wasted time.
        gc.collect()
        gc.freeze()

    async def generate(self, work: TextWork) -> AsyncGenerator[list[Bit], None]:
        """As `written`; while there are no bits there is an empty list every second, so that silence means something.

        Over the wire it does without.
        """
        async with aclosing(told_regularly(self.written(work), WORD_EVERY_S)) as told:
            async for bits in told:
                yield bits or []

    async def written(self, work: TextWork) -> AsyncGenerator[list[Bit], None]:
        """The work's bits; what is wrong with it is one too, so that every exception means: this replica is gone."""
        if not self._started:
            self._started = True
            self.engine.start()
            self._telling = asyncio.get_running_loop().create_task(self._tell())
        facts = {"prompt_tokens": sum(map(len, work.prompts)), "choices": len(work.numbers)}
        with at_replica(self._tracer, [work.trace] if work.trace else [], facts) as found:
            try:
                async with aclosing(self.engine.generate(work)) as told:
                    async for bits in told:
                        yield bits
            except FettleError as error:
                found["error"] = error.message
                yield [Bit(number, error=error) for number in work.answers]

    async def _tell(self) -> None:
        """Metrics, once a second."""
        family = serve.get_replica_context().deployment.partition(f".{self._name}@")[0]
        exporter = Exporter()
        while True:
            tell_generator(family, self._name, self.engine.generator, exporter)
            await asyncio.sleep(EVERY_S)

    async def check_health(self) -> None:
        await self._wire.begin()
        if self._started:
            self.engine.check()

    async def __del__(self) -> None:
        await self._wire.end()


def _drafters(manifest: VariantManifest, options: TextOptions) -> tuple[list[Drafter], int]:
    """Who guesses for this variant, and the bytes that are left for its own keys and values."""
    text, left = options.text, options.text.cache_bytes
    # In lower precisions several tokens at once differ from one by one by more than the last digits.
    if manifest.precision is not Precision.FP32:
        return [], left
    drafters: list[Drafter] = [PromptLookup()] if text.lookup else []
    if options.draft is not None:
        runner = options.draft.load(lambda directory: open_runner(directory, options.engine))
        runner.warm_up()
        assert runner.manifest.decoder is not None
        room = left // DRAFT_PART // runner.bytes_per_token
        if room > 1:
            context = min(runner.manifest.decoder.context, room)
            drafters.append(DraftModel(runner, context))
            left -= context * runner.bytes_per_token
    return drafters, left


class ReplicaStreams:
    """The lane's `Replicas`: calls over Serve's handle, which picks the replica with the fewest under way.

    A stream that is given up keeps its place at the silent replica, so that what is done again goes elsewhere.
    """

    def __init__(self, handle: DeploymentHandle, stuck_after_s: float = math.inf, links: Links | None = None) -> None:
        self.replicas = 0
        self._handle = direct(handle, stream=True)
        self._links = links or Links()
        self._patience = Patience(stuck_after_s, lambda: self.replicas > 0)

    def resize(self, replicas: int) -> None:
        """Tell how many replicas are running now."""
        if replicas < self.replicas:
            self._patience.forget()
        self.replicas = replicas

    async def generate(self, work: TextWork) -> AsyncGenerator[list[Bit], None]:
        link = self._links.pick()
        async with aclosing(self._through_ray(work) if link is None else _over(link, work)) as told:
            async for bits in told:
                yield bits

    async def _through_ray(self, work: TextWork) -> AsyncGenerator[list[Bit], None]:
        self._links.through_ray += 1
        given_up, stream = False, None
        try:
            with losses():
                stream = self._handle.generate.remote(work)
                while True:
                    call = asyncio.ensure_future(next_of(stream))
                    if not await self._patience.wait(call):
                        given_up = True
                        call.add_done_callback(lambda _: stream.cancel())
                        raise SlotLostError(f"no word in {self._patience.seconds:g} s")
                    bits = call.result()
                    if bits is None:
                        return
                    if bits:
                        yield bits
        finally:
            self._links.through_ray -= 1
            if stream is not None and not given_up:
                stream.cancel()


async def _over(link: Link, work: TextWork) -> AsyncGenerator[list[Bit], None]:
    """Over the wire; what came while nobody read is one bit of each choice."""
    async with aclosing(link.stream("generate", work)) as told:
        async for items in told:
            yield items[0] if len(items) == 1 else merged(bit for bits in items for bit in bits)
