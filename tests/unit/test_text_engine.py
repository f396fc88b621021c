"""A replica's text engine: bits of text from one thread, whoever reads, leaves or fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from deployments.text_engine import TextEngine
from deployments.text_source import EarlyStop, Ids
from deployments.text_work import Bit, TextWork, merged
from fettle.detokenize import Detokenizer
from fettle.errors import EngineError, RequestError
from fettle.extract import PatternAnswer, extractor
from fettle.generation import GREEDY, Constraint, Finish, Sampling
from fettle.votes import VoteRule, Votes
from tests.fake_text import PRINTABLE, byte_tokenizer, fake_manifest
from tests.unit.test_generator import CONTEXT
from workers.fake_decoder import FakeRunner
from workers.generator import Generator

pytestmark = pytest.mark.anyio

TOKENIZER = byte_tokenizer()
EXTRACT = extractor(PatternAnswer(pattern="[a-z]"))


class NoRules:
    def constraint(self, work: TextWork, prompt: Ids) -> Constraint | None:
        return None


class Refusing:
    def constraint(self, work: TextWork, prompt: Ids) -> Constraint | None:
        raise RequestError("no such grammar", param="response_format")


def engine(rules: object = None, **parameters: object) -> TextEngine:
    runner = FakeRunner(fake_manifest(vocabulary=PRINTABLE, context=CONTEXT, **parameters))
    generator = Generator(runner, memory_bytes=16384 * runner.bytes_per_token, max_slots=8)
    return TextEngine(generator, Detokenizer(TOKENIZER), rules or NoRules(), EXTRACT)  # type: ignore[arg-type]


@pytest.fixture
async def running() -> AsyncIterator[TextEngine]:
    made = engine()
    made.start()
    yield made
    made.close()


def ids(text: str) -> Ids:
    return np.array(TOKENIZER.encode(text).ids, np.int32)


def work(id: str = "w", *prompts: str, **terms: object) -> TextWork:
    texts = prompts or ("Hello-there",)
    given: dict[str, object] = {"sampling": Sampling(seed=1), "max_tokens": (20,) * len(texts)} | terms
    return TextWork(id, tuple(ids(text) for text in texts), **given)  # type: ignore[arg-type]


async def everything(engine: TextEngine, asked: TextWork) -> list[Bit]:
    return [bit async for bits in engine.generate(asked) for bit in bits]


async def whole(engine: TextEngine, asked: TextWork) -> dict[int, Bit]:
    return {bit.choice: bit for bit in merged(await everything(engine, asked))}


def decoded(bit: Bit) -> str:
    return TOKENIZER.decode([token.id for token in bit.tokens])


async def test_text_is_what_the_tokens_say(running):
    bit = (await whole(running, work()))[0]
    assert len(bit.tokens) == 20
    assert bit.text == decoded(bit)
    assert bit.finish is Finish.LENGTH


async def test_a_stream_has_the_same_in_pieces(running):
    bits = await everything(running, work("a", stream=True))
    assert len(bits) > 3
    assert merged(bits)[0].text == (await whole(running, work("b")))[0].text


async def test_without_a_stream_all_comes_at_once(running):
    calls = [bits async for bits in running.generate(work("w", "one", "another", choices=2))]
    assert [[bit.over for bit in bits] for bits in calls] == [[True] * 4]
    assert sorted(bit.choice for bit in calls[0]) == [0, 1, 2, 3]


async def test_a_stop_string_ends_it_wherever_tokens_end(running):
    full = (await whole(running, work("a")))[0].text
    stop = full[7:10]
    cut = (await whole(running, work("b", stop=(stop, "never"))))[0]
    assert cut.text == full[: full.index(stop)]
    assert (cut.finish, cut.stopped_by) == (Finish.STOP, stop)
    kept = (await whole(running, work("c", stop=(stop,), keep_stop=True)))[0]
    assert kept.text == full[: full.index(stop) + len(stop)]


async def test_an_end_token_ends_it_and_is_named(running):
    token = (await whole(running, work("a")))[0].tokens[5].id
    cut = (await whole(running, work("b", end_ids=frozenset({token}))))[0]
    assert (cut.finish, cut.stopped_by) == (Finish.STOP, token)
    assert len(cut.tokens) <= 5


@pytest.mark.parametrize(("begin", "told_text"), [(11, 9), (8, 8)])
async def test_another_replica_goes_on_in_the_middle(running, begin, told_text):
    """Also where the last token told was the beginning of a stop string, so that its text was held back."""
    full = (await whole(running, work("a", choices=2)))[1]
    stops = (full.text[begin : begin + 4],)
    cut = (await whole(running, work("b", choices=2, stop=stops)))[1]
    told = tuple(token.id for token in full.tokens[:9])
    rest = (await whole(running, work("c", choices=2, stop=stops, only=(1,), given={1: told})))[1]
    assert full.text[:told_text] + rest.text == cut.text == full.text[:begin]
    assert (*told, *(token.id for token in rest.tokens)) == tuple(token.id for token in cut.tokens)


async def test_who_leaves_frees_its_slots_and_no_others(running):
    long = work("long", max_tokens=(400,), stream=True)
    stays = asyncio.create_task(whole(running, work("stays", max_tokens=(50,))))
    stream = running.generate(long)
    await anext(stream)
    await stream.aclose()
    assert len((await stays)[0].tokens) == 50
    for _ in range(200):
        if not running.generator.busy:
            break
        await asyncio.sleep(0.01)
    assert running.generator.alive == running.generator.waiting == 0
    assert not running._writers


async def test_many_calls_at_once_get_their_own(running):
    texts = [f"prompt-number-{number}" for number in range(20)]
    found = await asyncio.gather(*(whole(running, work(text, text, stream=True)) for text in texts))
    again = [await whole(running, work(f"{text}!", text)) for text in texts]
    assert [bits[0].text for bits in found] == [bits[0].text for bits in again]
    assert len({bits[0].text for bits in found}) == len(texts)


async def test_many_streams_are_told_together_and_their_end_at_once(running, monkeypatch):
    # A turn that never comes: there is the first piece, and the one with the end.
    monkeypatch.setattr("deployments.text_engine.COALESCED_S_EACH", 60.0)
    monkeypatch.setattr("deployments.text_engine.COALESCED_S", 60.0)

    async def pieces(name: str) -> list[list[Bit]]:
        return [bits async for bits in running.generate(work(name, name, stream=True))]

    async with asyncio.timeout(20):
        found = await asyncio.gather(*(pieces(f"text-{number}") for number in range(8)))
    assert max(map(len, found)) <= 2
    assert all(len(told[-1][-1].tokens) + sum(len(bits[0].tokens) for bits in told[:-1]) == 20 for told in found)


async def test_the_turn_of_many_streams_comes(running, monkeypatch):
    monkeypatch.setattr("deployments.text_engine.COALESCED_S_EACH", 0.001)
    texts = [f"text-{number}" for number in range(8)]
    long = [everything(running, work(text, text, stream=True, max_tokens=(300,))) for text in texts]
    found = await asyncio.gather(*long)
    assert min(map(len, found)) > 3


async def test_a_prompt_that_cannot_be_fails_alone(running):
    bits = await whole(running, work("w", "fine", "x" * CONTEXT))
    assert bits[0].finish is Finish.LENGTH
    assert isinstance(bits[1].error, RequestError)


async def test_rules_that_cannot_be_kept_begin_nothing():
    refusing = engine(Refusing())
    refusing.start()
    with pytest.raises(RequestError, match="no such grammar"):
        await everything(refusing, work())
    assert not refusing.generator.busy
    refusing.close()


async def test_a_broken_engine_tells_everybody_and_goes_on(monkeypatch):
    broken = engine()
    broken.start()
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "step", lambda self: 1 / 0)
        bits = await whole(broken, work())
    assert isinstance(bits[0].error, EngineError)
    assert (await whole(broken, work("again")))[0].finish is Finish.LENGTH
    broken.check()
    broken.close()
    with pytest.raises(EngineError, match="has ended"):
        broken.check()


async def test_closing_breaks_off_what_is_under_way():
    closing = engine(ms_per_call=5)
    closing.start()
    task = asyncio.create_task(whole(closing, work(max_tokens=(400,))))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(closing.close)
    assert isinstance((await task)[0].error, EngineError)


async def test_the_clients_own_thresholds(running):
    full = (await whole(running, work("a", max_tokens=(200,))))[0]
    ending = work(
        "b", max_tokens=(200,), early_stop=EarlyStop(end_probability=0.02), end_ids=frozenset({PRINTABLE - 1})
    )
    cut = (await whole(running, ending))[0]
    assert cut.finish is Finish.EARLY_END
    assert full.text.startswith(cut.text)
    early = EarlyStop(answer_confidence=1e-9, answer_pattern="[a-z]")
    answered = (await whole(running, work("c", max_tokens=(200,), early_stop=early)))[0]
    assert answered.finish is Finish.EARLY_ANSWER
    assert full.text.startswith(answered.text)
    assert answered.text[-1:].islower()


# Votes.


@pytest.mark.parametrize("seed", range(6))
async def test_a_vote_has_the_winner_of_all_choices(running, seed):
    asked = work(f"v{seed}", "one", "two", choices=9, sampling=Sampling(seed=seed), max_tokens=(12, 12))
    texts = await whole(running, replace(asked, id=f"all{seed}"))
    found = await whole(running, replace(asked, vote=0.0))
    for prompt in range(2):
        votes = Votes(VoteRule(9))
        for choice in range(9):
            votes.see(choice, EXTRACT(texts[prompt * 9 + choice].text))
        won = EXTRACT(found[prompt].text)
        assert votes.winner is None or won == votes.winner
        drawn, agreed = found[prompt].votes
        assert agreed <= drawn <= 9
        assert (found[prompt].finish is Finish.EARLY_VOTE) == (drawn < 9)


async def test_a_vote_that_all_agree_on_draws_no_more_than_it_needs(running):
    asked = work("v", choices=9, sampling=GREEDY, vote=0.0)
    bit = (await whole(running, asked))[0]
    assert bit.finish is Finish.EARLY_VOTE
    assert bit.votes == (5, 5)
    assert not running.generator.busy
