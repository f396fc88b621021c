"""Early stopping: each state machine against the definition, looked up in the whole text."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.extract import Answer, PatternAnswer, TextAnswer, extractor
from fettle.findings import AnswerGate, EndGate, Floor, Gate, Step, StopGates, TextGates, TextScore
from fettle.generation import Finish, Token
from fettle.stopping import (
    AnswerPart,
    EndPart,
    GiveUpPart,
    Watch,
    reaches,
    takes,
    tokens_of,
    wants_end,
    wants_logprobs,
    watch,
    watch_step,
)
from fettle.text_scores import score_of, tally
from fettle.text_trace import Trace
from tests.unit.random_traces import EXTRACT, PIECES, random_trace

seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from([0.0, 0.05, 0.2, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0])
# exp(sum of log-probabilities), through a line that bends.
PRODUCT = TextScore(weights={"sum": 1.0}, raw=[-5.0, -1.0, 0.0], agreed=[0.0, 0.5, 1.0], rows=1)
LOWEST = TextScore(weights={"lowest": 2.0}, raw=[-5.0, 0.0], agreed=[0.0, 1.0], rows=1)
MEAN = TextScore(weights={"mean": 1.0}, raw=[-5.0, 0.0], agreed=[0.0, 1.0], rows=1)


def trace_with(seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    return random_trace(rng, coarse=bool(rng.integers(2)))


def piece(token: int) -> str:
    return PIECES[token]


def run(part: Callable[[], EndPart | AnswerPart | GiveUpPart], trace: Trace) -> Watch:
    found = Watch(part())
    found.see(list(trace.tokens()))
    return found


@given(seeds, shares, st.integers(0, 4))
def test_the_end_stops_before_the_first_token_where_it_was_probable_enough(seed: int, threshold: float, least: int):
    trace = trace_with(seed)
    threshold = max(threshold, 0.05)
    found = run(lambda: EndPart(EndGate(threshold=threshold, min_tokens=least)), trace)
    places = [i for i in range(least, len(trace.ids)) if trace.end[i] >= np.float32(threshold)]
    expected = (Finish.EARLY_END, places[0], places[0] + 1) if places else (None, len(trace.ids), len(trace.ids))
    assert (found.finish, found.kept, found.tokens) == expected


def answer_stop(trace: Trace, gate: AnswerGate) -> int | None:
    """After how many tokens, with everything worked out anew at each place."""
    texts = [trace.text[:end] for end in trace.ends.tolist()]
    looks = [n for n in range(1, len(texts) + 1) if n >= gate.first and (n - gate.first) % gate.every == 0]
    for at, count in enumerate(looks):
        answer = EXTRACT(texts[count - 1])
        if not answer.found:
            continue
        same = at
        while same > 0 and EXTRACT(texts[looks[same - 1] - 1]) == answer:
            same -= 1
        if at - same + 1 < gate.stable:
            continue
        # Where it was first read of these times, its last occurrence there.
        text = texts[looks[same] - 1]
        begin = max(text.rfind(answer.value), text.lower().rfind(answer.value) if answer.value not in text else -1)
        starts = [0, *trace.ends.tolist()]
        own = range(looks[same])
        if begin >= 0:
            stop = begin + len(answer.value)
            own = [i for i in own if starts[i] < stop and starts[i + 1] > begin]
        logprobs = [float(trace.logprob[i]) for i in own]
        sure = math.exp(math.fsum(logprobs) if gate.measure == "product" else min(logprobs))
        if not any(map(math.isnan, logprobs)) and np.float32(sure) >= np.float32(gate.threshold):
            return count
    return None


@settings(max_examples=300)
@given(
    seeds,
    shares,
    st.sampled_from(["product", "lowest"]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_the_answer_stops_where_it_is_stable_and_sure(seed, threshold, measure, stable, first, every):
    trace = trace_with(seed)
    gate = AnswerGate(threshold=threshold, measure=measure, stable=stable, first=first, every=every)
    found = run(lambda: AnswerPart(gate, piece, EXTRACT), trace)
    expected = answer_stop(trace, gate)
    assert (found.finish is Finish.EARLY_ANSWER, found.kept) == (expected is not None, expected or len(trace.ids))


@given(seeds, st.sampled_from([PRODUCT, LOWEST]), shares)
def test_what_is_given_up_would_never_have_been_taken_and_is_given_up_at_once(seed, score, accept):
    trace = trace_with(seed)
    found = run(lambda: GiveUpPart(score, accept), trace)
    step = Step(variant="a", gates=[Gate(threshold=accept)], text=TextGates(score=score))
    logprobs = trace.logprob.tolist()
    scores = [scored(score, logprobs[: n + 1]) for n in range(len(logprobs))]
    missed = [n + 1 for n, value in enumerate(scores) if not reaches(value, accept)]
    assert (found.finish is Finish.ESCALATED, found.kept) == (bool(missed), missed[0] if missed else len(logprobs))
    if missed:
        # However it went on, with more tokens or by its end.
        for end in (math.nan, 0.5, 1.0):
            assert not takes(Finish.STOP, scored(score, logprobs, end), step, last=False)


def scored(score: TextScore, logprobs: list[float], end: float = math.nan) -> float:
    return score_of(score, tally(logprobs, end))


def test_floors_hold_after_their_own_number_of_tokens_alone():
    # The means of their log-probabilities score 0.861, 0.920 and 0.940.
    tokens = [Token(0, math.log(p)) for p in (0.5, 0.9, 0.9)]
    for after, score, kept in (
        (1, 0.87, 1),
        (1, 0.86, None),
        (2, 0.93, 2),
        (3, 0.93, None),
        (3, 0.95, 3),
        (4, 1.0, None),
    ):
        found = Watch(GiveUpPart(MEAN, 0.95, [Floor(after=after, score=score)]))
        assert found.see(tokens) is (Finish.ESCALATED if kept else None)
        assert found.kept == (kept or 3)


def test_a_score_that_may_rise_again_gives_nothing_up_without_floors():
    assert Watch(GiveUpPart(MEAN, 1.0)).see([Token(0, -20.0)]) is None


@settings(max_examples=200)
@given(seeds, st.lists(st.integers(1, 4), max_size=12))
def test_it_does_not_matter_in_which_steps_the_tokens_come(seed: int, sizes: list[int]):
    trace = trace_with(seed)
    rng = np.random.default_rng(seed)
    gates = TextGates(
        end=EndGate(threshold=float(rng.choice([0.3, 0.5]))),
        answer=AnswerGate(threshold=float(rng.choice([0.3, 0.8])), stable=int(rng.integers(1, 3))),
        score=PRODUCT,
    )
    together, apart = (watch(gates, piece, EXTRACT, accept=0.2) for _ in range(2))
    assert together is not None
    assert apart is not None
    tokens = list(trace.tokens())
    verdict = together.see(tokens)
    for size in (*sizes, len(tokens)):
        apart.see(tokens[:size])
        del tokens[:size]
    assert (apart.finish, apart.kept, apart.tokens) == (verdict, together.kept, together.tokens)


def test_after_the_verdict_nothing_changes():
    found = Watch(EndPart(EndGate(threshold=0.5)))
    assert found.see([Token(1, end=0.0), Token(2, end=0.9), Token(3, end=0.0)]) is Finish.EARLY_END
    assert found.see([Token(4, end=0.0)]) is Finish.EARLY_END
    assert (found.kept, found.tokens) == (1, 2)


def test_at_one_token_the_end_goes_before_giving_up_and_that_before_the_answer():
    gates = TextGates(end=EndGate(threshold=0.5), answer=AnswerGate(threshold=0.1), score=PRODUCT)
    for end, accept, expected in (
        (0.9, 0.9, Finish.EARLY_END),
        (0.1, 0.9, Finish.ESCALATED),
        (0.1, 0.1, Finish.EARLY_ANSWER),
    ):
        found = watch(gates, piece, EXTRACT, accept=accept)
        assert found is not None
        # The first token has no answer in it and costs nothing; the second says "Red" with a probability of 0.4.
        assert found.see([Token(7, 0.0, end=0.0), Token(9, math.log(0.4), end=end)]) is expected


def test_nan_stops_nothing_but_an_attempt_that_cannot_be_scored():
    nothing = [Token(0), Token(0)]
    gates = TextGates(end=EndGate(threshold=0.01), answer=AnswerGate(threshold=0.0), score=PRODUCT)
    found = watch(gates, piece, EXTRACT)
    assert found is not None
    assert found.see(nothing) is None
    found = watch(gates, piece, EXTRACT, accept=0.0)
    assert found is not None
    assert found.see(nothing) is Finish.ESCALATED


def test_there_is_no_watch_where_nothing_can_stop():
    assert watch(StopGates(), piece, EXTRACT) is None
    assert watch(StopGates(answer=AnswerGate(threshold=0.5)), piece, None) is None
    assert watch(TextGates(score=PRODUCT), piece, EXTRACT) is None
    assert watch(TextGates(score=PRODUCT), piece, EXTRACT, accept=0.5) is not None
    plain = Step(variant="a", gates=[Gate(threshold=0.5)])
    assert watch_step(plain, piece, EXTRACT, last=False) is None
    scored_step = plain.model_copy(update={"text": TextGates(score=PRODUCT)})
    assert watch_step(scored_step, piece, EXTRACT, last=False) is not None
    assert watch_step(scored_step, piece, EXTRACT, last=True) is None


def test_what_the_engine_has_to_tell():
    end, answer, score = (
        StopGates(end=EndGate(threshold=0.5)),
        StopGates(answer=AnswerGate(threshold=0.5)),
        TextGates(score=PRODUCT),
    )
    assert [wants_end(gates) for gates in (end, answer, score, StopGates())] == [True, False, True, False]
    assert [wants_logprobs(gates) for gates in (end, answer, score, StopGates())] == [False, True, True, False]


def test_whose_answer_is_taken():
    step = Step(variant="a", gates=[Gate(threshold=0.7)])
    assert takes(Finish.STOP, 0.7, step, last=False)
    assert takes(Finish.EARLY_ANSWER, float(np.float32(0.7)), step, last=False)
    assert not takes(Finish.STOP, 0.699, step, last=False)
    assert not takes(Finish.STOP, math.nan, step, last=False)
    assert not takes(Finish.ESCALATED, 1.0, step, last=False)
    assert takes(Finish.STOP, math.nan, step, last=True)


@pytest.mark.parametrize(
    ("value", "pieces", "expected"),
    [
        ("blue", ["it is ", "bl", "ue", "."], slice(1, 3)),
        ("blue", ["blue", " or blue"], slice(1, 2)),
        ("BLUE", ["so ", "Blue"], slice(1, 2)),
        ("blue", ["so ", "", "bl", "", "ue"], slice(2, 5)),
        ("42", ["forty", "-two"], slice(0, 2)),
        ("", ["a", "b"], slice(0, 2)),
        # Folding makes two letters of this one, so that places would be off by one.
        ("blue", ["ß ", "BLUE"], slice(0, 2)),
    ],
)
def test_the_tokens_of_an_answer(value: str, pieces: list[str], expected: slice):
    ends = np.cumsum([len(each) for each in pieces]).tolist()
    assert tokens_of(value, "".join(pieces), ends) == expected


def test_only_the_answers_own_tokens_count():
    extract = extractor(PatternAnswer(pattern=r"is (\w+)\.", take="last"))
    pieces = ["well ", "it is ", "blue", ".", " yes"]
    gate = AnswerGate(threshold=0.8)
    sure = [0.1, 0.2, 0.9, 0.3, 0.5]
    found = Watch(AnswerPart(gate, lambda token: pieces[token], extract))
    tokens = [Token(number, math.log(p)) for number, p in enumerate(sure)]
    assert found.see(tokens) is Finish.EARLY_ANSWER
    # Only with the full stop is there an answer.
    assert found.kept == 4


def test_a_whole_text_as_the_answer_is_stable_only_while_nothing_is_added():
    found = Watch(AnswerPart(AnswerGate(threshold=0.0, stable=2), piece, extractor(TextAnswer())))
    assert found.see([Token(0, 0.0), Token(1, 0.0), Token(5, 0.0)]) is None
    assert found.see([Token(8, 0.0)]) is Finish.EARLY_ANSWER


def test_in_long_texts_an_answer_is_looked_for_less_often():
    looked: list[int] = []

    def extract(text: str) -> Answer:
        looked.append(len(text))
        return Answer(text, found=False)

    found = Watch(AnswerPart(AnswerGate(threshold=0.5, first=3), lambda _: "x", extract))
    assert found.see([Token(0, -0.1)] * 4000) is None
    assert looked[:70] == [*range(3, 65), *range(66, 82, 2)]
    assert all(later - before == max(1, before // 32) for before, later in pairwise(looked))
    assert len(looked) < 250
