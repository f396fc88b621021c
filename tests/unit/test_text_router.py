"""Which way answers a text: classes, cascades, streams, votes, what is watched; by engines over the fake model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.lane import Lane
from deployments.reports import MonitorReply, RouterReport
from deployments.router import Router, Wishes
from deployments.served import Quality, ServedFamily
from deployments.text_engine import TextEngine
from deployments.text_router import TextRouter
from deployments.text_source import EarlyStop, Piece, TextCall
from deployments.text_writer import extract_of
from deployments.tracing import Tracer
from deployments.watch import Watch
from fettle.config import LimitConfig
from fettle.errors import EngineError, RequestError
from fettle.family import FAMILY_FILE, Family
from fettle.findings import Certificate, Gate, Step, TextGates, TextScore, VotePoint
from fettle.generation import GREEDY, Finish, Sampling
from fettle.manifest import TaskKind
from fettle.tokenizer import Tokenizer
from tests.fakes import FakeVariant, change_json, give_points, make_point
from tests.texts import FIRST_BYTE, IM_END, ids_of, make_text_family
from tests.unit.test_lane import COSTS, Engines
from tests.unit.test_text_engine import NoRules
from workers.engine import open_runner
from workers.generator import Generator

pytestmark = pytest.mark.anyio

# Of the fake model a text's tokens have 0.046 on average.
LIKELY = TextScore(weights={"mean": 1.0}, raw=[-3.2, -3.0], agreed=[0.0, 1.0], rows=10)
ANSWER = {"kind": "pattern", "pattern": "[a-m]"}
# Only small letters, so that there is an answer in about every second text.
LETTERS = {FIRST_BYTE + byte: -100.0 for byte in range(256) if not 97 <= byte <= 122} | {IM_END: 3.0}


def cascade(threshold: float) -> Step:
    return Step(variant="int4", gates=[Gate(threshold=threshold)], text=TextGates(score=LIKELY))


LAST = Step(variant="bf16", gates=[Gate(threshold=0.0)], text=TextGates())
SINGLE = Step(variant="int4", gates=[Gate(threshold=0.0)], text=TextGates())


@dataclass
class Served:
    source: TextRouter
    engines: dict[str, TextEngine]
    reports: list[RouterReport]

    @property
    def family(self) -> ServedFamily:
        return self.source.router.families["lm"]

    def call(self, prompt: str, level: float | str | None = None, **terms: Any) -> TextCall:
        asked = self.source.router.ask("lm", TaskKind.GENERATE, Wishes(max_disagreement=level, explain=True))
        given = {"sampling": GREEDY, "max_tokens": 24} | terms
        model = given.pop("model", None)
        if model is not None:
            asked = self.source.router.ask(model, TaskKind.GENERATE, Wishes())
        return TextCall(f"{prompt}-{time.monotonic_ns()}", asked, (np.array(ids_of(prompt), np.int32),), **given)

    async def pieces(self, call: TextCall) -> list[Piece]:
        async with aclosing(self.source.open(call)) as stream:
            return [piece async for piece in stream]

    async def text(self, call: TextCall) -> str:
        return "".join(piece.text for piece in await self.pieces(call))

    async def way(self, call: TextCall) -> tuple[str | None, str]:
        """The point, and the variant that answered in the end."""
        pieces = await self.pieces(call)
        answering = pieces[0].answering
        assert answering is not None
        return answering.point, answering.variants[-1]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = make_text_family(
        tmp_path / "lm", variants=[FakeVariant("bf16"), FakeVariant("int4", salt=1), FakeVariant("tiny", salt=2)]
    )
    task = made.manifest.task.model_dump(mode="json") | {"answer": ANSWER}
    change_json(made.directory / FAMILY_FILE, task=task)
    points = [
        make_point("strict", 0.01, cascade(0.5), LAST, cost=5.0),
        make_point("loose", 0.05, SINGLE, cost=1.0),
    ]
    give_points(made.directory, points)
    family = Family.open(made.directory)
    engines = {}
    for name in family.variants:
        runner = open_runner(family.variant_path(name))
        generator = Generator(runner, memory_bytes=8192 * runner.bytes_per_token, max_slots=8)
        tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
        engines[name] = TextEngine(generator, tokenizer.detokenizer, NoRules(), extract_of(family.manifest.task))
        engines[name].start()
    lanes = {name: Lane(Engines(engine), COSTS, places=8, max_queue_s=2.0) for name, engine in engines.items()}
    tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
    families = {"lm": ServedFamily("lm", family, tokenizer, lanes, Quality.of(0.01))}
    reports: list[RouterReport] = []

    async def send(report: RouterReport) -> MonitorReply:
        reports.append(report)
        return MonitorReply((), {})

    watch = Watch("r", families, send=send, share=1.0, seed=0)
    await watch.report()
    router = Router(families, LimitConfig(), watch=watch, id="r")
    yield Served(TextRouter(router), engines, reports)
    for engine in engines.values():
        engine.close()


async def test_a_class_goes_along_its_point_and_exact_is_the_reference(served):
    assert (await served.way(served.call("one", 0.05)))[0] == "strict", "the most faithful while there is room"
    assert await served.way(served.call("one", "exact")) == (None, "bf16")
    assert await served.way(served.call("one", 0.001)) == (None, "bf16")
    assert (await served.way(served.call("one")))[0] == "strict"


async def test_an_attempt_is_taken_or_goes_on(served):
    """By its score; what comes back is the variant's own text either way."""
    texts: dict[str, int] = {}
    for number in range(20):
        prompt = f"prompt {number}"
        pieces = await served.pieces(served.call(prompt, 0.01))
        answering, spent = pieces[0].answering, pieces[-1].spent
        text = "".join(piece.text for piece in pieces)
        variant = answering.variants[-1]
        texts[variant] = texts.get(variant, 0) + 1
        assert text == await served.text(served.call(prompt, model=f"lm:{variant}"))
        attempts = spent.explained["attempts"]
        assert (variant == "bf16") == (len(attempts) == 1)
        if attempts:
            assert attempts[0]["score"][0] is None or attempts[0]["score"][0] < 0.5
            taken = sum(len(piece.tokens) for piece in pieces)
            assert spent.completion_tokens == taken + attempts[0]["tokens"]
    assert set(texts) == {"bf16", "int4"}


async def test_a_stream_goes_by_a_way_of_one_step(served):
    assert await served.way(served.call("one", 0.05, stream=True)) == ("loose", "int4")
    pieces = await served.pieces(served.call("one", 0.05, stream=True))
    assert len(pieces) > 3
    strict = await served.pieces(served.call("one", 0.01, stream=True))
    assert strict[0].answering.point == "strict", "there is no other in this class: it waits until it is taken"


@pytest.mark.parametrize(
    "terms",
    [
        {"sampling": Sampling(seed=1)},
        {"sampling": replace(GREEDY, presence_penalty=0.5)},
        {"choices": 2},
        {"stop": ("x",)},
        {"min_tokens": 3},
        {"early_stop": EarlyStop(end_probability=0.5)},
    ],
)
async def test_what_no_certificate_is_about_is_the_references(served, terms):
    assert await served.way(served.call("one", 0.05, **terms)) == (None, "bf16")


async def test_a_named_variant_answers_anything(served):
    asked = {"sampling": Sampling(seed=1), "choices": 2, "model": "lm:tiny"}
    assert await served.way(served.call("one", **asked)) == (None, "tiny")


async def test_answers_are_compared_with_the_references(served):
    prompts = [f"prompt {number}" for number in range(12)]
    sampling = replace(GREEDY)
    differ = 0
    for prompt in prompts:
        pieces = await served.pieces(served.call(prompt, 0.01, sampling=sampling))
        text = "".join(piece.text for piece in pieces)
        truth = await served.text(served.call(prompt, "exact", sampling=sampling))
        differ += served.family.extract(text) != served.family.extract(truth)
    while served.source.router.watch._comparing:
        await next(iter(served.source.router.watch._comparing))
    await served.source.router.watch.report()
    pairs = [pair for report in served.reports for pair in report.pairs]
    assert len(pairs) == len(prompts)
    assert {pair.point for pair in pairs} == {"strict"}
    assert sum(pair.differs for pair in pairs) == differ > 0
    places = [place for report in served.reports for place in report.places]
    assert sum(sum(map(sum, place.answered)) for place in places) == len(prompts)


async def test_a_vote_is_answered_by_what_most_say(served):
    sampling = Sampling(seed=3, logit_bias=LETTERS)
    asked = served.call("one", model="lm:int4", sampling=sampling, choices=7, vote=True, max_tokens=4)
    pieces = await served.pieces(asked)
    spent = pieces[-1].spent
    assert len(spent.votes) == 1
    assert spent.votes[0].won <= spent.votes[0].drawn <= 7
    assert pieces[-1].finish in (Finish.EARLY_VOTE, Finish.LENGTH, Finish.STOP)


async def test_a_certified_vote_says_so_and_draws_fewer(served):
    proof = Certificate(alpha=0.05, delta=0.05, errors=9, rows=1000, p_value=0.01, upper_bound=0.016)
    vote = VotePoint(id="vote-within-0.05", choices=15, confidence=0.6, temperature=0.7, drawn=4.0, certificate=proof)
    manifest = served.family.family.manifest
    served.family.family.manifest = manifest.model_copy(update={"votes": [vote]})
    drawn = {}
    for level in ("exact", 0.05):
        spent = 0
        for number in range(12):
            asked = served.call(
                f"prompt {number}", level, sampling=Sampling(0.7, seed=number), choices=15, vote=True, max_tokens=8
            )
            pieces = await served.pieces(asked)
            answering = pieces[0].answering
            assert (answering.point, answering.bound) == (
                ("vote-within-0.05", 0.016) if level == 0.05 else (None, "exact")
            )
            spent += pieces[-1].spent.votes[0].drawn
        drawn[level] = spent
    assert drawn[0.05] < drawn["exact"]
    own = served.call("one", 0.05, sampling=Sampling(0.7), choices=15, vote=True, max_tokens=8, stop=("q",))
    assert (await served.pieces(own))[0].answering.point is None


async def test_a_vote_needs_an_answer(served):
    silent = served.family.task.model_copy(update={"answer": None})
    served.family.family.manifest = served.family.family.manifest.model_copy(update={"task": silent})
    with pytest.raises(RequestError, match="--answer"):
        await served.pieces(served.call("one", model="lm:int4", choices=3, vote=True))


async def test_what_fails_is_told_and_frees_everything(served):
    served.engines["bf16"].close()
    with pytest.raises(EngineError):
        await served.text(served.call("one", "exact"))
    assert served.family.batchers["bf16"].running == 0


async def test_the_wait_for_a_place_is_told_as_such(served):
    served.family.batchers["bf16"].places = 1
    async with aclosing(served.source.open(served.call("first", "exact", stream=True, max_tokens=400))) as first:
        await anext(first)
        second = asyncio.create_task(served.pieces(served.call("second", "exact")))
        await asyncio.sleep(0.05)
        assert not second.done()
    [answering] = [piece.answering for piece in await second if piece.answering]
    assert answering.queue_ms >= 50


async def test_requests_are_counted_by_point_and_variant(served):
    for number in range(3):
        await served.text(served.call(f"prompt {number}", 0.05, stream=True))
    counts = served.source.router.telemetry.snapshot([served.family.gauges()])["families"]["lm"]
    assert counts["counters"]["points"] == {"loose": 3}


async def test_each_attempt_is_a_step_of_the_trace(served):
    spans = InMemorySpanExporter()
    tracer = Tracer(SimpleSpanProcessor(spans))
    attempts: dict[int, list[str]] = {}
    for number in range(12):
        trace = tracer.begin("POST /v1/completions", None)
        assert trace is not None
        call = served.call(f"prompt {number}", 0.01)
        terms = replace(call.asked.terms, trace=trace)
        pieces = await served.pieces(replace(call, asked=replace(call.asked, terms=terms)))
        trace.end(200)
        assert pieces[-1].spent is not None
        tried = [attempt["variant"] for attempt in pieces[-1].spent.explained["attempts"]]
        attempts[trace.span.context.trace_id] = [*tried, pieces[0].answering.variants[-1]]
    assert {len(variants) for variants in attempts.values()} == {1, 2}
    done = spans.get_finished_spans()
    roots = {span.context.span_id: span.context.trace_id for span in done if span.parent is None}
    for id, variants in attempts.items():
        own = [span for span in done if span.context.trace_id == id]
        steps = [span for span in own if span.name == "step"]
        assert [step.attributes["variant"] for step in steps] == variants
        assert all(roots[step.parent.span_id] == id for step in steps)
        assert [span.parent.span_id for span in own if span.name == "inference"] == [
            step.context.span_id for step in steps
        ]
