"""The step loop: whatever shares the batch, and in whatever order, each generation is what it would be alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.errors import EngineError, RequestError
from fettle.generation import GREEDY, Finish, Prompt, Sampling, Step, Token
from fettle.sampling import Draw, Sampler
from tests.fake_text import fake_manifest
from workers.decoder import Floats, Ids
from workers.fake_decoder import FakeRunner, expected
from workers.generator import Generator
from workers.speculation import AGAIN, NOTHING, SELDOM, DraftModel, PromptLookup, Speculation

VOCABULARY = 50
CONTEXT = 512


def runner(context: int = CONTEXT, **parameters: object) -> FakeRunner:
    return FakeRunner(fake_manifest(vocabulary=VOCABULARY, context=context, **parameters))


def generator(tokens: int = 8192, **options: object) -> Generator:
    made = runner()
    return Generator(made, memory_bytes=tokens * made.bytes_per_token, **options)  # type: ignore[arg-type]


def prompt(number: int, size: int, max_tokens: int = 10, **terms: object) -> Prompt:
    ids = np.random.default_rng(1000 * size + number).integers(0, VOCABULARY - 1, size, np.int32)
    return Prompt(str(number), ids, max_tokens, **({"sampling": Sampling(seed=number)} | terms))  # type: ignore[arg-type]


def alone(prompt: Prompt) -> tuple[list[int], Finish]:
    """By one token after the other, from the logits' definition."""
    sampler, draw = Sampler(VOCABULARY), Draw(prompt, VOCABULARY)
    history, drawn = list(prompt.ids), []
    while len(drawn) < prompt.max_tokens:
        if len(history) >= CONTEXT:
            return drawn, Finish.CONTEXT
        (token,) = sampler.sample(expected(np.array(history, np.int32), VOCABULARY)[None], [draw])
        assert isinstance(token, Token)
        if token.id in prompt.end_ids:
            return drawn, Finish.STOP
        draw.take(token.id)
        drawn.append(token.id)
        history.append(token.id)
    return drawn, Finish.LENGTH


class Run:
    """Collects what a generator says."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.tokens: dict[str, list[int]] = {}
        self.steps: dict[str, list[Step]] = {}

    def step(self) -> None:
        for step in self.generator.step():
            before = self.steps.setdefault(step.id, [])
            assert not before or not before[-1].over, "nothing follows the end"
            before.append(step)
            self.tokens.setdefault(step.id, []).extend(token.id for token in step.tokens)

    def finish(self, most: int = 5000) -> Run:
        for _ in range(most):
            if not self.generator.busy:
                return self
            self.step()
        raise AssertionError("it does not end")

    def end(self, id: str) -> Finish | None:
        return self.steps[id][-1].finish


def assert_as_alone(run: Run, prompts: Sequence[Prompt]) -> None:
    for each in prompts:
        assert (run.tokens[each.id], run.end(each.id)) == alone(each)


def mixed(seed: int, count: int = 12) -> list[Prompt]:
    chance = random.Random(seed)
    ends = frozenset({VOCABULARY - 1, 7})
    prompts = []
    for number in range(count):
        terms: dict[str, object] = {"end_ids": ends if chance.random() < 0.5 else frozenset()}
        if chance.random() < 0.4:
            terms["sampling"] = GREEDY
        prompts.append(prompt(number, chance.choice([1, 2, 9, 40, 150, 300]), chance.randint(1, 60), **terms))
    return prompts


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.sampled_from([CONTEXT, 1024, 2048, 16384]),
    slots=st.sampled_from([1, 2, 5, 32]),
    chunk=st.sampled_from([1, 7, 64, 256]),
)
def test_each_is_as_alone_whoever_else_is_there(seed, tokens, slots, chunk):
    """In any order of arrival, in pieces, with slots that grow and are taken away."""
    chance = random.Random(seed)
    prompts = mixed(seed)
    run = Run(generator(tokens, max_slots=slots, chunk=chunk))
    for each in prompts:
        run.generator.submit(each)
        for _ in range(chance.choice([0, 0, 1, 5, 30])):
            run.step()
    assert_as_alone(run.finish(), prompts)
    assert run.generator.alive == run.generator.waiting == 0


def test_memory_that_runs_out_costs_time_and_nothing_else():
    prompts = [prompt(number, 100, 200) for number in range(6)]
    run = Run(generator(1024))
    for each in prompts:
        run.generator.submit(each)
    assert_as_alone(run.finish(), prompts)
    assert run.generator.stats.preempted > 0


def test_who_is_less_urgent_gives_up_its_slot():
    run = Run(generator(CONTEXT, max_slots=1))
    low, high = prompt(1, 20, 40, priority=1), prompt(2, 20, 5)
    run.generator.submit(low)
    for _ in range(10):
        run.step()
    run.generator.submit(high)
    for _ in range(8):
        run.step()
    assert run.end("2") is Finish.LENGTH
    assert_as_alone(run.finish(), [low, high])
    assert run.generator.stats.preempted == 1


def test_equals_wait_for_each_other_in_order():
    run = Run(generator(CONTEXT, max_slots=1))
    prompts = [prompt(number, 10, 10) for number in range(3)]
    for each in prompts:
        run.generator.submit(each)
    run.finish()
    assert list(run.steps) == ["0", "1", "2"]
    assert run.generator.stats.preempted == 0


# Beginnings that are known.


def test_a_beginning_that_is_known_is_not_fed_again():
    head = np.arange(40, dtype=np.int32)
    prompts = [
        Prompt(str(number), np.concatenate([head, np.full(5, number, np.int32)]), 20, Sampling(seed=number))
        for number in range(6)
    ]
    run = Run(generator())
    for each in prompts:
        run.generator.submit(each)
        run.step()
    assert_as_alone(run.finish(), prompts)
    assert run.generator.stats.reused_tokens == 5 * len(head)
    assert [run.steps[str(number)][0].cached for number in range(6)] == [0, *[len(head)] * 5]


def test_the_same_prompt_again_feeds_its_last_tokens_only():
    first = Run(generator())
    first.generator.submit(prompt(1, 30))
    first.finish()
    again = Run(first.generator)
    again.generator.submit(prompt(1, 30))
    fed = again.generator.stats.fed_tokens
    assert_as_alone(again.finish(), [prompt(1, 30)])
    assert again.generator.stats.fed_tokens == fed + 2


def test_choices_of_one_prompt_share_it_and_differ():
    choices = [
        Prompt(f"choice-{choice}", np.arange(60, dtype=np.int32) % 49, 20, Sampling(seed=5), choice=choice)
        for choice in range(4)
    ]
    run = Run(generator())
    for each in choices:
        run.generator.submit(each)
    assert_as_alone(run.finish(), choices)
    assert run.generator.stats.reused_tokens == 3 * 58
    assert len({tuple(tokens) for tokens in run.tokens.values()}) == 4


# Ends.


def test_it_ends_where_the_context_does():
    long = prompt(1, CONTEXT - 5, 100)
    run = Run(generator())
    run.generator.submit(long)
    assert_as_alone(run.finish(), [long])
    assert run.end("1") is Finish.CONTEXT
    assert len(run.tokens["1"]) == 5


def test_a_watcher_ends_it_and_sees_each_token_once():
    seen: list[int] = []

    def watch(tokens: Sequence[Token]) -> Finish | None:
        seen.extend(token.id for token in tokens)
        return Finish.EARLY_ANSWER if len(seen) == 4 else None

    run = Run(generator())
    run.generator.submit(prompt(1, 20, 30, watch=watch))
    run.finish()
    assert run.end("1") is Finish.EARLY_ANSWER
    assert run.tokens["1"] == seen
    assert len(seen) == 4


@pytest.mark.parametrize("after", [0, 1, 3, 12])
def test_who_is_cancelled_is_gone_at_once(after):
    prompts = [prompt(number, 200, 20) for number in range(4)]
    run = Run(generator(2048, chunk=64))
    for each in prompts:
        run.generator.submit(each)
    for _ in range(after):
        run.step()
    assert run.generator.cancel("1")
    assert not run.generator.cancel("1")
    told = len(run.tokens.get("1", []))
    run.finish()
    assert len(run.tokens.get("1", [])) == told
    assert_as_alone(run, [each for each in prompts if each.id != "1"])
    assert run.generator.alive == run.generator.waiting == 0


def test_a_row_that_fails_fails_alone():
    made = runner(fail_on_token=49)
    run = Run(Generator(made, memory_bytes=8192 * made.bytes_per_token))
    prompts = [prompt(number, 20, 100) for number in range(4)]
    poisoned = [each for each in prompts if 49 in alone(each)[0][:-1]]
    assert 0 < len(poisoned) < 4
    for each in prompts:
        run.generator.submit(each)
    run.finish()
    for each in poisoned:
        assert isinstance(run.steps[each.id][-1].error, EngineError)
        assert run.tokens[each.id] == alone(each)[0][: alone(each)[0].index(49) + 1]
    assert_as_alone(run, [each for each in prompts if each not in poisoned])


@pytest.mark.parametrize(
    ("ids", "says"),
    [([], "at least one token"), ([VOCABULARY], "0 to 49"), ([-1], "0 to 49"), ([1] * CONTEXT, "shorten it")],
)
def test_a_prompt_that_cannot_be_is_refused(ids, says):
    with pytest.raises(RequestError, match=says):
        generator().submit(Prompt("1", np.array(ids, np.int32), 5))


def test_memory_for_nothing_is_refused():
    with pytest.raises(EngineError, match="megabytes"):
        Generator(runner(), memory_bytes=10)


def test_the_prompts_own_probabilities():
    run = Run(generator(chunk=7))
    asked = prompt(1, 30, 3, prompt_logprobs=True, sampling=Sampling(temperature=0.0, logprobs=2))
    run.generator.submit(prompt(2, 30, 30))
    run.step()
    run.generator.submit(asked)
    run.finish()
    told = next(step.prompt for step in run.steps["1"] if step.prompt is not None)
    assert [token.id for token in told] == asked.ids.tolist()
    assert np.isnan(told[0].logprob)
    for place in (1, 13, 29):
        logits = expected(asked.ids[:place], VOCABULARY).astype(np.float64)
        right = logits[asked.ids[place]] - np.log(np.exp(logits).sum())
        assert told[place].logprob == pytest.approx(right, abs=1e-5)
        assert told[place].top[0][0] == logits.argmax()


@pytest.mark.parametrize("told", [0, 1, 7])
def test_another_worker_goes_on_where_one_was_lost(told):
    whole = prompt(1, 30, 12, sampling=Sampling(seed=4, repetition_penalty=1.2))
    drawn, _ = alone(whole)
    run = Run(generator())
    run.generator.submit(replace(whole, given=tuple(drawn[:told])))
    run.finish()
    assert run.tokens["1"] == drawn[told:]
    assert run.end("1") is Finish.LENGTH


def test_the_end_token_is_told_apart():
    asked = prompt(1, 30, 200, end_ids=frozenset({7, 21}), want_end=True)
    run = Run(generator())
    run.generator.submit(asked)
    end = run.finish().steps["1"][-1].end
    assert end is not None
    assert end.id in asked.end_ids
    assert 0 < end.end < 1
    assert end.id not in run.tokens["1"]


# Guessing ahead.


class Scripted:
    """Guesses so many tokens right, then one wrong."""

    def __init__(self, text: Sequence[int], right: int) -> None:
        self.text, self.right = list(text), right

    def propose(self, tokens: Ids, most: int) -> Ids:
        guess = self.text[len(tokens) :][:most]
        for place in range(self.right, len(guess)):
            guess[place] = (guess[place] + 1) % VOCABULARY
        return np.array(guess, np.int32)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3), Sampling(seed=3, repetition_penalty=1.3, top_p=0.8)])
@pytest.mark.parametrize("right", [0, 2, 8])
def test_a_guess_changes_nothing_but_the_number_of_steps(sampling, right):
    asked = prompt(1, 30, 40, sampling=sampling)
    text = [*asked.ids.tolist(), *alone(asked)[0]]
    run = Run(generator(speculation=Speculation([Scripted(text, right)])))
    run.generator.submit(asked)
    assert_as_alone(run.finish(), [asked])
    stats = run.generator.stats
    assert stats.drafted > 0
    assert stats.accepted == 0 if right == 0 else stats.accepted >= stats.drafted * right // 9
    assert len(run.steps["1"]) == 40 - stats.accepted


def test_guesses_end_where_the_text_does():
    asked = prompt(1, 30, 200, end_ids=frozenset({7, 21}))
    text = [*asked.ids.tolist(), *alone(prompt(1, 30, 200))[0]]
    run = Run(generator(speculation=Speculation([Scripted(text, 8)])))
    run.generator.submit(asked)
    assert_as_alone(run.finish(), [asked])
    assert run.end("1") is Finish.STOP


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), tokens=st.sampled_from([1024, 8192]))
def test_with_guesses_each_is_still_as_alone(seed, tokens):
    chance = random.Random(seed)
    prompts = mixed(seed, 6)
    drafter = chance.choice([PromptLookup(), DraftModel(runner(), CONTEXT), DraftModel(Other(runner()), CONTEXT)])
    run = Run(generator(tokens, speculation=Speculation([drafter])))
    for each in prompts:
        run.generator.submit(each)
        for _ in range(chance.choice([0, 5, 50])):
            run.step()
    assert_as_alone(run.finish(), prompts)


class Other:
    """Nearly the same model: wrong about every third token."""

    def __init__(self, inner: FakeRunner) -> None:
        self.inner, self.context, self._calls = inner, CONTEXT, 0

    def allocate(self, slots: int, context: int) -> None:
        self.inner.allocate(slots, context)

    def feed(self, slot: int, ids: Ids, start: int, logits: int) -> Floats:
        return self._off(self.inner.feed(slot, ids, start, logits))

    def decode(self, ids: Ids, lengths: Ids) -> Floats:
        return self._off(self.inner.decode(ids, lengths))

    def _off(self, logits: Floats) -> Floats:
        self._calls += 1
        return np.roll(logits, 1, axis=1) if self._calls % 3 == 0 else logits


def test_the_same_model_guesses_all_greedy_tokens():
    asked = prompt(1, 30, 60, sampling=GREEDY)
    run = Run(generator(speculation=Speculation([DraftModel(runner(), CONTEXT)])))
    run.generator.submit(asked)
    assert_as_alone(run.finish(), [asked])
    assert run.generator.stats.accepted == run.generator.stats.drafted > 0


def test_look_up_finds_what_followed_before():
    tokens = np.array([1, 2, 3, 4, 5, 9, 2, 3, 4], np.int32)
    assert PromptLookup().propose(tokens, 2).tolist() == [5, 9]
    assert PromptLookup().propose(np.array([1, 2, 3], np.int32), 2).tolist() == []
    assert PromptLookup().propose(np.array([1], np.int32), 2).tolist() == []


class Guesser:
    """Any tokens, as many as it is asked for; or none."""

    def __init__(self, knows: bool = True) -> None:
        self.knows = knows
        self.asked: list[int] = []

    def propose(self, tokens: Ids, most: int) -> Ids:
        self.asked.append(most)
        return np.zeros(most if self.knows else 0, np.int32)


def rehearsed(speculation: Speculation, turns: int, check_s: Callable[[int], float], right: int) -> list[int]:
    """How many tokens each turn guessed, where a plain one takes 10 ms."""
    tokens, guessed = np.arange(10, dtype=np.int32), []
    for _ in range(turns):
        guess = len(speculation.propose(tokens, 100))
        if guess:
            speculation.verified(min(right, guess), check_s(guess))
        else:
            speculation.decoded(0.01)
        guessed.append(guess)
    return guessed


@pytest.mark.parametrize(
    ("check_s", "right", "best"),
    [
        (lambda guess: 0.01 + 0.001 * guess, 8, 8),
        (lambda guess: 0.01 + 0.001 * guess, 4, 4),
        (lambda guess: 0.01 + 0.004 * guess, 2, 2),
        (lambda guess: 0.02, 0, 0),
        (lambda guess: 0.01 + 0.012 * guess, 8, 0),
    ],
)
def test_as_many_tokens_are_guessed_as_pay(check_s, right, best):
    speculation = Speculation([Guesser()])
    assert rehearsed(speculation, 1, check_s, right) == [0], "the plain pace is not known yet"
    rehearsed(speculation, 100, check_s, right)
    assert speculation.pays is (best > 0)
    usual, guesses = Counter(rehearsed(speculation, 10 * AGAIN, check_s, right)).most_common(1)[0]
    assert (usual, guesses < 10 * AGAIN) == (best, True), "another way, now and then"


def test_a_way_that_does_not_pay_is_asked_ever_more_seldom_and_comes_back():
    drafter = Guesser()
    speculation = Speculation([drafter])
    rehearsed(speculation, 20_000, lambda guess: 0.05, 0)
    assert len(drafter.asked) < 200
    rehearsed(speculation, 5 * SELDOM, lambda guess: 0.005, 8)
    assert speculation.pays


def test_a_drafter_without_a_guess_leaves_the_turn_to_the_next():
    silent, other = Guesser(knows=False), Guesser()
    speculation = Speculation([silent, other])
    told = rehearsed(speculation, 500, lambda guess: 0.01, 8)
    assert Counter(told).most_common(1)[0][0] == 8
    assert len(silent.asked) > 300


def test_no_room_no_guess():
    speculation = Speculation([PromptLookup()])
    speculation.decoded(0.01)
    assert speculation.propose(np.array([1, 2, 1, 2], np.int32), 0) is NOTHING
