"""The sampler: distributions against exact probabilities, what each parameter means, and no row depends on another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fettle.errors import EngineError, RequestError
from fettle.generation import GREEDY, Finish, Prompt, Sampling, Token
from fettle.sampling import Draw, Outcome, Sampler, largest, nucleus, pick

DRAWS = 4000
# With fixed seeds a test passes always or never; a right sampler's chance of never, for each, is this.
LEVEL = 1e-4

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -1.5, 1.5, -30.0], np.float32)


@dataclass
class Grammar:
    """A constraint that the test sets; remembers what it was told."""

    masks: list[Any]
    taken: list[int] = field(default_factory=list)

    def allowed(self) -> Any:
        mask = self.masks[len(self.taken)]
        if isinstance(mask, Exception):
            raise mask
        return mask

    def advance(self, token: int) -> None:
        self.taken.append(token)


def begin(sampling: Sampling | None = None, ids: list[int] | None = None, vocabulary: int = 8, **terms: Any) -> Draw:
    prompt = Prompt(
        id="a", ids=np.array(ids or [0], np.int32), max_tokens=10, sampling=sampling or Sampling(seed=1), **terms
    )
    return Draw(prompt, vocabulary)


def only(outcomes: list[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


def token_of(logits: np.ndarray, draw: Draw) -> Token:
    outcome = only(Sampler(len(logits)).sample(logits[None], [draw]))
    assert isinstance(outcome, Token)
    return outcome


def frequencies(logits: np.ndarray, sampling: Sampling, **terms: Any) -> np.ndarray:
    """How often each token comes at the first position, over `DRAWS` seeds."""
    sampler, counts = Sampler(len(logits)), np.zeros(len(logits), int)
    for seed in range(DRAWS):
        settings = {name: getattr(sampling, name) for name in Sampling.__slots__} | {"seed": seed}
        outcome = only(sampler.sample(logits[None], [begin(Sampling(**settings), vocabulary=len(logits), **terms)]))
        assert isinstance(outcome, Token)
        counts[outcome.id] += 1
    return counts


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def assert_drawn_from(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's test, with all that is expected less than five times as one cell; what is impossible never comes."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    often = expected >= 5
    seen, wanted = list(counts[often]), list(expected[often])
    if (~often & (probabilities > 0)).any() and expected[~often].sum() >= 5:
        seen.append(counts[~often].sum())
        wanted.append(expected[~often].sum())
    statistic = sum((s - w) ** 2 / w for s, w in zip(seen, wanted, strict=True))
    assert statistic < stats.chi2.ppf(1 - LEVEL, len(seen) - 1)


# Greedy


def test_greedy_is_the_most_likely_token_and_of_equal_ones_the_first() -> None:
    assert token_of(LOGITS, begin(GREEDY)).id == 0
    assert token_of(np.array([0, 3, 1, 3], np.float32), begin(GREEDY, vocabulary=4)).id == 1


def test_greedy_needs_no_seed_and_says_nothing_that_nobody_asked_for() -> None:
    token = token_of(LOGITS, begin(GREEDY))
    assert math.isnan(token.logprob)
    assert math.isnan(token.end)
    assert token.top == ()


def test_a_batch_of_greedy_rows() -> None:
    logits = np.random.default_rng(0).standard_normal((32, 500)).astype(np.float32)
    outcomes = Sampler(500).sample(logits, [begin(GREEDY, vocabulary=500) for _ in range(32)])
    assert [token.id for token in outcomes if isinstance(token, Token)] == logits.argmax(axis=1).tolist()


# Distributions


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    assert_drawn_from(frequencies(LOGITS, Sampling(temperature=temperature)), softmax(LOGITS / temperature))


def test_extreme_temperatures() -> None:
    assert token_of(LOGITS, begin(Sampling(temperature=5e-324, seed=3))).id == 0
    assert_drawn_from(frequencies(LOGITS, Sampling(temperature=1e30)), np.full(8, 1 / 8))


def test_top_k_keeps_the_largest() -> None:
    kept = np.where(np.isin(np.arange(8), [0, 6, 1]), softmax(LOGITS), 0)
    assert_drawn_from(frequencies(LOGITS, Sampling(top_k=3)), kept / kept.sum())


def test_top_k_of_all_but_one() -> None:
    kept = np.where(np.arange(3) == 2, 0, softmax(LOGITS[:3]))
    assert_drawn_from(frequencies(LOGITS[:3], Sampling(top_k=2)), kept / kept.sum())


def test_top_k_of_more_than_there_are_is_no_limit() -> None:
    assert_drawn_from(frequencies(LOGITS, Sampling(top_k=100)), softmax(LOGITS))


def test_top_p_keeps_the_fewest_that_have_the_share() -> None:
    # 0.42, 0.25, 0.15 in the order 0, 6, 1: two have 0.67, the third is needed for 0.7.
    kept = np.where(np.isin(np.arange(8), [0, 6, 1]), softmax(LOGITS), 0)
    assert_drawn_from(frequencies(LOGITS, Sampling(top_p=0.7)), kept / kept.sum())


def test_top_p_counts_what_top_k_left() -> None:
    # Of the three that top_k leaves, two have 0.81 of the mass; of all, they have 0.67.
    kept = np.where(np.isin(np.arange(8), [0, 6]), softmax(LOGITS), 0)
    assert_drawn_from(frequencies(LOGITS, Sampling(top_k=3, top_p=0.75)), kept / kept.sum())


def test_top_p_comes_after_temperature() -> None:
    probabilities = softmax(LOGITS / 3)
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), 0.6)) + 1
    kept = np.where(np.isin(np.arange(8), order[:count]), probabilities, 0)
    assert count > 2
    assert_drawn_from(frequencies(LOGITS, Sampling(temperature=3.0, top_p=0.6)), kept / kept.sum())


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_the_smallest_top_p_is_greedy(top_p: float) -> None:
    assert frequencies(LOGITS, Sampling(top_p=top_p))[0] == DRAWS


def test_min_p_is_a_share_of_the_most_likely() -> None:
    probabilities = softmax(LOGITS)
    kept = np.where(probabilities >= 0.2 * probabilities.max(), probabilities, 0)
    assert 1 < (kept > 0).sum() < 7
    assert_drawn_from(frequencies(LOGITS, Sampling(min_p=0.2)), kept / kept.sum())


def test_min_p_then_top_k_then_top_p() -> None:
    probabilities = softmax(LOGITS)
    kept = np.where(np.isin(np.arange(8), [0, 6, 1]), probabilities, 0)
    sampling = Sampling(min_p=0.1, top_k=4, top_p=0.85)
    assert_drawn_from(frequencies(LOGITS, sampling), kept / kept.sum())


def test_a_large_vocabulary_goes_through_blocks() -> None:
    """The same distribution, spread over 5,000 tokens, with groups far apart."""
    logits = np.full(5000, -np.inf, np.float32)
    places = [0, 255, 256, 511, 2600, 4863, 4864, 4999]
    logits[places] = LOGITS
    counts = frequencies(logits, Sampling())
    assert counts.sum() == counts[places].sum()
    assert_drawn_from(counts[places], softmax(LOGITS))


def test_tokens_that_the_model_rules_out_never_come() -> None:
    logits = np.array([-np.inf, 1, -np.inf, 0], np.float32)
    counts = frequencies(logits, Sampling(temperature=5.0))
    assert counts[[0, 2]].sum() == 0


# Penalties, bias, end tokens


def after(draw: Draw, tokens: list[int]) -> Draw:
    for token in tokens:
        draw.take(token)
    return draw


def adjusted(draw: Draw, logits: np.ndarray = LOGITS) -> np.ndarray:
    outcome = draw.adjust(logits.copy())
    assert not isinstance(outcome, Finish)
    return outcome[0]


def test_presence_and_frequency_are_of_generated_tokens_only() -> None:
    draw = after(begin(Sampling(presence_penalty=0.5, frequency_penalty=0.25), ids=[0, 1, 2]), [3, 3, 3, 6])
    expected = LOGITS.copy()
    expected[3] -= 0.5 + 3 * 0.25
    expected[6] -= 0.5 + 0.25
    np.testing.assert_allclose(adjusted(draw), expected, rtol=1e-6)


def test_negative_penalties_encourage() -> None:
    draw = after(begin(Sampling(presence_penalty=-1.0)), [4])
    assert adjusted(draw)[4] == LOGITS[4] + 1


def test_repetition_is_of_prompt_and_output_and_scales_towards_less() -> None:
    draw = after(begin(Sampling(repetition_penalty=2.0), ids=[0, 4, 4]), [1, 5])
    expected = LOGITS.copy()
    expected[[0, 1]] /= 2
    expected[[4, 5]] *= 2
    np.testing.assert_allclose(adjusted(draw), expected, rtol=1e-6)


def test_all_penalties_and_bias_in_vllms_order() -> None:
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={0: 1.0, 5: 4})
    draw = after(begin(sampling, ids=[0]), [5])
    expected = LOGITS.copy()
    expected[0] = (2.0 + 1.0) / 2
    expected[5] = (-1.5 + 4) / 2 - 0.5 - 0.25
    np.testing.assert_allclose(adjusted(draw), expected, rtol=1e-6)


def test_a_long_history_is_counted_right() -> None:
    tokens = np.random.default_rng(0).integers(1000, size=5000).tolist()
    draw = after(begin(Sampling(frequency_penalty=0.5), vocabulary=1000), tokens)
    expected = -0.5 * np.bincount(tokens, minlength=1000)
    np.testing.assert_allclose(adjusted(draw, np.zeros(1000, np.float32)), expected)


def test_penalties_change_what_greedy_takes() -> None:
    draw = begin(Sampling(temperature=0.0, frequency_penalty=1.0))
    taken = []
    for _ in range(4):
        taken.append(token_of(LOGITS, draw).id)
        draw.take(taken[-1])
    assert taken == [0, 6, 0, 1]


def test_bias_forces_and_forbids() -> None:
    assert frequencies(LOGITS, Sampling(logit_bias={7: 100.0}))[7] == DRAWS
    assert frequencies(LOGITS, Sampling(logit_bias={0: -100.0}))[0] == 0


@pytest.mark.parametrize("token", [-1, 8])
def test_a_bias_outside_the_vocabulary_is_the_requests_fault(token: int) -> None:
    with pytest.raises(RequestError, match=rf"token id {token} is outside the vocabulary \(0 to 7\)") as caught:
        begin(Sampling(logit_bias={token: 1.0}))
    assert caught.value.param == "logit_bias"


def test_end_tokens_come_only_after_min_tokens() -> None:
    draw = begin(GREEDY, end_ids=frozenset({0, 6}), min_tokens=2)
    assert token_of(LOGITS, draw).id == 1
    draw.take(1)
    assert token_of(LOGITS, draw).id == 1
    draw.take(1)
    assert token_of(LOGITS, draw).id == 0


# Grammars


def mask(*ids: int) -> np.ndarray:
    return np.isin(np.arange(8), ids)


def test_only_what_the_grammar_allows_is_drawn() -> None:
    probabilities = np.where(mask(1, 3, 7), softmax(LOGITS), 0)
    counts = frequencies(LOGITS, Sampling(), constraint=Grammar([mask(1, 3, 7)]))
    assert_drawn_from(counts, probabilities / probabilities.sum())


def test_top_p_counts_what_the_grammar_left() -> None:
    counts = frequencies(LOGITS, Sampling(top_p=0.5), constraint=Grammar([mask(1, 3, 7)]))
    assert counts[1] == DRAWS


def test_a_grammar_hears_of_each_token_and_may_allow_all() -> None:
    grammar = Grammar([None, mask(2)])
    draw = begin(GREEDY, constraint=grammar)
    draw.take(token_of(LOGITS, draw).id)
    assert grammar.taken == [0]
    assert token_of(LOGITS, draw).id == 2


def test_log_probabilities_are_the_models_own_under_a_grammar() -> None:
    draw = begin(Sampling(temperature=0.0, logprobs=1), constraint=Grammar([mask(3)]))
    token = token_of(LOGITS, draw)
    assert token.id == 3
    assert token.logprob == pytest.approx(math.log(softmax(LOGITS)[3]), abs=1e-5)
    assert token.top[0][0] == 0


def test_a_grammar_that_is_complete_before_min_tokens_ends_the_text() -> None:
    draw = begin(constraint=Grammar([mask(6)]), end_ids=frozenset({6}), min_tokens=3)
    assert only(Sampler(8).sample(LOGITS[None], [draw])) is Finish.STOP


def test_a_grammar_that_is_complete_gives_the_end_token() -> None:
    draw = begin(constraint=Grammar([mask(6)]), end_ids=frozenset({6}))
    assert token_of(LOGITS, draw).id == 6


def test_a_grammar_without_a_way_on_is_this_rows_error() -> None:
    stuck = begin(constraint=Grammar([mask()]), end_ids=frozenset({6}))
    outcomes = Sampler(8).sample(np.stack([LOGITS, LOGITS]), [stuck, begin(GREEDY)])
    assert isinstance(outcomes[0], EngineError)
    assert "grammar" in outcomes[0].message
    assert isinstance(outcomes[1], Token)


def test_what_the_grammar_raises_is_this_rows_outcome() -> None:
    error = RequestError("too complex", param="guided_regex")
    outcomes = Sampler(8).sample(
        np.stack([LOGITS, LOGITS]), [begin(GREEDY), begin(constraint=Grammar([error]), end_ids=frozenset({6}))]
    )
    assert isinstance(outcomes[0], Token)
    assert outcomes[1] is error


def test_a_grammar_that_allows_only_what_the_model_rules_out() -> None:
    logits = np.array([0, -np.inf], np.float32)
    draw = begin(vocabulary=2, constraint=Grammar([np.array([False, True])]))
    assert isinstance(only(Sampler(2).sample(logits[None], [draw])), EngineError)


# Broken rows


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=1), Sampling(seed=1, top_p=0.5, logprobs=3)])
def test_a_row_that_is_not_numbers_fails_alone(bad: float, sampling: Sampling) -> None:
    logits = np.stack([LOGITS] * 3)
    logits[1, 5] = bad
    good, broken, last = Sampler(8).sample(logits, [begin(sampling) for _ in range(3)])
    assert isinstance(broken, EngineError)
    assert "not a number" in broken.message
    assert isinstance(good, Token)
    assert isinstance(last, Token)
    assert good.id == last.id


def test_a_row_of_nothing_but_minus_infinity() -> None:
    outcome = only(Sampler(8).sample(np.full((1, 8), -np.inf, np.float32), [begin()]))
    assert isinstance(outcome, EngineError)


def test_terms_that_make_a_row_infinite_fail_it_alone() -> None:
    draw = begin(Sampling(seed=1, logit_bias={2: math.inf}))
    outcomes = Sampler(8).sample(np.stack([LOGITS, LOGITS]), [draw, begin()])
    assert isinstance(outcomes[0], EngineError)
    assert isinstance(outcomes[1], Token)


# What is told


def test_log_probabilities_are_before_temperature_and_penalties() -> None:
    sampling = Sampling(temperature=0.3, logit_bias={4: 50.0}, presence_penalty=1.0, logprobs=3, seed=1)
    token = token_of(LOGITS, begin(sampling))
    logprobs = np.log(softmax(LOGITS))
    assert token.id == 4
    assert token.logprob == pytest.approx(logprobs[4], abs=1e-5)
    assert [index for index, _ in token.top] == [0, 6, 1]
    np.testing.assert_allclose([value for _, value in token.top], logprobs[[0, 6, 1]], atol=1e-5)


def test_of_equally_likely_tokens_the_first_are_told() -> None:
    logits = (np.arange(900) % 3).astype(np.float32)
    logits[-7:] = 3
    token = token_of(logits, begin(Sampling(temperature=0.0, logprobs=20), vocabulary=900))
    assert [index for index, _ in token.top] == [*range(893, 900), *range(2, 41, 3)]


@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_log_probabilities_of_logits_far_from_zero(shift: float) -> None:
    token = token_of(LOGITS + np.float32(shift), begin(Sampling(seed=1, logprobs=1)))
    assert token.logprob == pytest.approx(math.log(softmax(LOGITS)[token.id]), abs=1e-4)


def test_no_others_are_told_for_zero_log_probabilities() -> None:
    token = token_of(LOGITS, begin(Sampling(temperature=0.0, logprobs=0)))
    assert token.top == ()
    assert token.logprob == pytest.approx(math.log(softmax(LOGITS)[0]), abs=1e-5)


def test_more_log_probabilities_than_tokens() -> None:
    assert len(token_of(LOGITS, begin(Sampling(temperature=0.0, logprobs=20))).top) == 8


def test_the_probability_of_ending_is_the_sum_over_the_end_tokens() -> None:
    draw = begin(GREEDY, end_ids=frozenset({1, 6}), want_end=True, min_tokens=5)
    token = token_of(LOGITS, draw)
    assert token.end == pytest.approx(softmax(LOGITS)[[1, 6]].sum(), abs=1e-6)
    assert math.isnan(token.logprob)


def test_the_prompts_own_tokens_are_scored() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)
    tokens = Sampler(300).score(logits, np.array([5, 299, 0, 17], np.int32), 2)
    for row, token, wanted in zip(logits, tokens, [5, 299, 0, 17], strict=True):
        logprobs = np.log(softmax(row))
        assert token.id == wanted
        assert token.logprob == pytest.approx(logprobs[wanted], abs=1e-5)
        assert [index for index, _ in token.top] == np.argsort(-logprobs)[:2].tolist()


def test_a_prompt_that_gives_no_numbers_cannot_be_scored() -> None:
    with pytest.raises(EngineError):
        Sampler(2).score(np.array([[0, np.nan]], np.float32), np.array([0], np.int32), 0)


# Independence


def mixed_draws(vocabulary: int) -> list[Draw]:
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 1.0, "min_p": 0.05, "top_p": 0.99},
        {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 1.0, "logit_bias": {3: 5.0, 900: -5.0}, "logprobs": 4},
        {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 2},
    ]
    draws = []
    for row in range(32):
        sampling = Sampling(seed=row // 4, **kinds[row % len(kinds)])
        draw = begin(sampling, ids=[row, row + 1], vocabulary=vocabulary, choice=row % 4)
        draws.append(after(draw, [(7 * row + step) % vocabulary for step in range(row)]))
    return draws


def test_a_row_gives_the_same_token_alone_in_a_batch_and_in_any_order() -> None:
    vocabulary = 3000
    logits = 3 * np.random.default_rng(1).standard_normal((32, vocabulary)).astype(np.float32)
    together = Sampler(vocabulary).sample(logits, mixed_draws(vocabulary))
    alone = [
        only(Sampler(vocabulary).sample(logits[row : row + 1], [draw]))
        for row, draw in enumerate(mixed_draws(vocabulary))
    ]
    assert repr(alone) == repr(together)
    sampler, draws = Sampler(vocabulary), mixed_draws(vocabulary)
    for order in (np.arange(32)[::-1], np.random.default_rng(2).permutation(32), np.arange(0, 32, 3)):
        outcomes = sampler.sample(np.ascontiguousarray(logits[order]), [draws[row] for row in order])
        assert repr(outcomes) == repr([together[row] for row in order])


def test_logits_are_left_as_they_are() -> None:
    vocabulary = 3000
    logits = 3 * np.random.default_rng(1).standard_normal((32, vocabulary)).astype(np.float32)
    logits.setflags(write=False)
    Sampler(vocabulary).sample(logits, mixed_draws(vocabulary))


def test_the_same_seed_choice_and_position_is_the_same_number() -> None:
    first, second = begin(Sampling(seed=5), choice=2), begin(Sampling(seed=5, temperature=0.1), ids=[4, 4], choice=2)
    for _ in range(20):
        assert first.uniform == second.uniform
        first.take(1)
        second.take(2)


def test_the_numbers_of_seeds_choices_and_positions_are_unrelated() -> None:
    numbers = []
    for seed in (0, 1, 2**63 - 1, -1, 2**64 + 7):
        for choice in range(4):
            draw = begin(Sampling(seed=seed), choice=choice)
            for _ in range(100):
                numbers.append(draw.uniform)
                draw.take(0)
    assert len(set(numbers)) == 2000
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert_drawn_from(counts, np.full(20, 1 / 20))
    assert all(0 <= number < 1 for number in numbers)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(2000)


def test_the_numbers_stay_the_same_from_release_to_release() -> None:
    assert begin(Sampling(seed=1234), choice=1).uniform == 0.0423261726450761


def test_without_a_seed_each_generation_has_one_of_its_own() -> None:
    seeds = {begin(Sampling()).seed for _ in range(50)}
    assert len(seeds) == 50


# The parts


weights_lists = st.lists(st.integers(0, 6), min_size=1, max_size=40).filter(any)


@given(weights_lists, st.floats(0, 1))
def test_a_nucleus_is_what_sorting_gives(counts: list[int], share: float) -> None:
    weights = np.array(counts, np.float32)
    order = np.argsort(-weights, kind="stable")
    needed = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), share * weights.sum())) + 1
    assert nucleus(weights, share).tolist() == sorted(order[:needed].tolist())


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0, 12.0])
def test_a_large_nucleus_is_what_sorting_gives(share: float, spread: float) -> None:
    """Sums differ in the last digits with their order, so the smallest token may go in or stay out."""
    weights = np.exp(spread * np.random.default_rng(0).standard_normal(30_000)).astype(np.float32)
    weights /= weights.max()
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order], dtype=np.float64)
    inside = nucleus(weights, share)
    assert sorted(inside.tolist()) == sorted(order[: len(inside)].tolist())
    assert sums[len(inside) - 1] >= share * sums[-1] * (1 - 1e-5)
    assert len(inside) == 1 or sums[len(inside) - 2] < share * sums[-1] * (1 + 1e-5)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 70))
def test_the_largest_with_those_that_equal_the_last(numbers: list[int], count: int) -> None:
    values = np.array(numbers, np.float32)
    last = sorted(numbers)[-min(count, len(numbers))]
    assert largest(values, count).tolist() == [index for index, number in enumerate(numbers) if number >= last]


@pytest.mark.parametrize("count", [1, 5, 50, 700, 9_000, 19_999, 20_000])
def test_the_largest_of_many(count: int) -> None:
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    assert largest(values, count).tolist() == sorted(np.argsort(-values)[:count].tolist())


@given(weights_lists, st.floats(0, 1, exclude_max=True))
def test_what_is_picked_is_where_the_running_sum_passes(counts: list[int], uniform: float) -> None:
    index = pick(np.array(counts, np.float32), uniform)
    assert counts[index] > 0
    assert sum(counts[:index]) <= uniform * sum(counts) + 1e-9
    assert sum(counts[: index + 1]) >= uniform * sum(counts) - 1e-9


@pytest.mark.parametrize("size", [512, 513, 1000, 5000, 5120])
@pytest.mark.parametrize("uniform", [0.0, 1e-12, 0.25, 0.5, 0.999999, 1 - 2.0**-52])
def test_what_is_picked_of_many_always_has_a_weight(size: int, uniform: float) -> None:
    weights = np.random.default_rng(size).random(size, np.float32)
    weights[: size // 3] = 0
    weights[-size // 5 :] = 0
    index = pick(weights, uniform)
    assert weights[index] > 0
    sums = np.cumsum(weights, dtype=np.float64)
    assert sums[index] >= uniform * sums[-1] * (1 - 1e-6)
    assert sums[index] - weights[index] <= uniform * sums[-1] * (1 + 1e-6) + 1e-9
