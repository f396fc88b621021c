"""The search for text points and their certificates, against replays and in simulations with a known risk."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.certificates import fixed_sequence
from fettle.errors import PassError
from fettle.findings import AnswerGate, EndGate, Floor, Gate, Step, StopGates, TextGates, TextScore
from fettle.generation import Finish
from fettle.text_scores import FEATURES
from fettle.text_trace import Trace, replay_steps
from optimize.certify import BUDGETS
from optimize.text_certify import TextCandidate, TextProblem, certify_texts, plan, tables_of, text_in_words
from optimize.text_search import evaluated, give_up, search, thresholds
from optimize.text_tables import ALL_THE_WAY, Table, TokenCosts, evaluate, figures, with_threshold
from tests.unit.random_traces import EXTRACT, random_trace, trace_of

REFERENCE, CHEAP = "fp32", "int4"
COSTS = {REFERENCE: TokenCosts(0.1, 4.0), CHEAP: TokenCosts(0.05, 1.0)}
SCORES = [
    TextScore(weights={"sum": 1.0}, raw=[-6.0, -1.0, 0.0], agreed=[0.0, 0.5, 1.0], rows=1),
    TextScore(weights={"sum": 0.5, "lowest": 1.0}, raw=[-6.0, -1.0, 0.0], agreed=[0.0, 0.5, 1.0], rows=1),
    TextScore(weights={"tenth": 1.0, "length": -0.2}, raw=[-3.0, 0.0], agreed=[0.0, 1.0], rows=1),
]
seeds = st.integers(0, 2**32 - 1)


def tables_with(traces: dict[str, list[Trace]]) -> dict[str, Table]:
    answers = [EXTRACT(trace.text) for trace in traces[REFERENCE]]
    return {name: Table(own, COSTS[name], answers, EXTRACT) for name, own in traces.items()}


def random_text(rng: np.random.Generator, scored: bool) -> TextGates:
    answer = AnswerGate(
        threshold=float(rng.choice([0.0, 0.25, 0.5, 0.9])),
        measure="product" if rng.random() < 0.5 else "lowest",
        stable=int(rng.integers(1, 3)),
        first=int(rng.integers(1, 3)),
        every=int(rng.integers(1, 3)),
    )
    return TextGates(
        end=EndGate(threshold=float(rng.choice([0.2, 0.4, 0.5]))) if rng.random() < 0.5 else None,
        answer=answer if rng.random() < 0.5 else None,
        score=SCORES[int(rng.integers(len(SCORES)))] if scored else None,
        floors=[Floor(after=n, score=float(rng.random())) for n in (1, 3) if rng.random() < 0.4] if scored else [],
    )


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_what_the_tables_say_is_what_replays_say(seed: int):
    rng = np.random.default_rng(seed)
    names = [CHEAP, REFERENCE][int(rng.integers(2)) :]
    traces = {name: [random_trace(rng, coarse=bool(rng.integers(2))) for _ in range(15)] for name in (CHEAP, REFERENCE)}
    steps = [
        Step(
            variant=name,
            gates=[Gate(threshold=float(rng.choice([0.0, 0.25, 0.5, 0.9])))],
            text=random_text(rng, scored=name != names[-1] or bool(rng.integers(2))) if rng.random() < 0.9 else None,
        )
        for name in names
    ]
    found = evaluate(steps, tables_with(traces))
    for row in range(15):
        attempts = replay_steps([traces[name][row] for name in names], steps, EXTRACT)
        assert found.reached[:, row].sum() == len(attempts)
        assert found.drawn[: len(attempts), row].tolist() == [attempt.drawn for attempt in attempts]
        assert found.wrong[row] == (attempts[-1].answer != EXTRACT(traces[REFERENCE][row].text))
        assert found.given_up[row] == any(attempt.finish is Finish.ESCALATED for attempt in attempts)
        cost = sum(
            COSTS[step.variant].prompt_ms * 7 + COSTS[step.variant].decode_ms * max(0, attempt.drawn - 1)
            for step, attempt in zip(steps, attempts, strict=False)
        )
        assert found.cost_ms[row] == pytest.approx(cost)


def test_the_figures_of_a_point():
    """Two rows by hand: one is taken, one goes on after being given up."""
    good = trace_of([0, 6], ["red", "."], [math.log(0.9), 0.0], [0.0, 0.0, 1.0])
    bad = trace_of([4, 6], [" blue", "."], [math.log(0.2), 0.0], [0.0, 0.0, 1.0])
    other = trace_of([0], ["red"], [0.0], [0.0, 1.0])
    step = Step(variant=CHEAP, gates=[Gate(threshold=0.8)], text=TextGates(score=SCORES[0]))
    last = Step(variant=REFERENCE, gates=[Gate(threshold=0.0)])
    found = figures([step, last], tables_with({CHEAP: [good, bad], REFERENCE: [other, good]}), REFERENCE)
    assert (found.errors, found.reached, found.given_up) == (0, [1.0, 0.5], 0.5)
    assert found.tokens == [(3 + 1) / 2, 3 / 2]
    assert found.cost_ms == pytest.approx((0.35 + 2) / 2 + (0.35 + 0 + 0.7 + 8) / 2)
    assert found.reference_tokens == 2.5
    assert found.reference_cost_ms == pytest.approx((0.7 + 4 + 0.7 + 8) / 2)


def test_a_rising_threshold_stops_ever_later():
    rng = np.random.default_rng(5)
    table = tables_with({REFERENCE: [random_trace(rng) for _ in range(200)]})[REFERENCE]
    for kind in (StopGates(end=EndGate(threshold=1.0)), StopGates(answer=AnswerGate(threshold=1.0))):
        falling = thresholds(table, kind)
        assert falling == sorted(set(falling), reverse=True)
        drawn = [table.ends(with_threshold(kind, threshold)).drawn for threshold in falling]
        assert all((left >= right).all() for left, right in pairwise(drawn))
        assert drawn[-1].sum() < table.ends(ALL_THE_WAY).drawn.sum()


# A simulated task. The cheap variant's answer is right with the probability that it gives it; texts go on after the
# answer, and some answers ("red wine") begin as others ("red") do.


@lru_cache
def population(rows: int) -> dict[str, list[Trace]]:
    rng = np.random.default_rng(0)
    return {
        name: [made_of(rng, *row) for row in zip(truth, sure, strict=True)] for name, truth, sure in drawn(rng, rows)
    }


def drawn(rng: np.random.Generator, rows: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    truth = rng.integers(0, 4, rows)
    sure = 1 - rng.beta(0.25, 1.6, rows)
    agrees = rng.random(rows) < sure
    other = (truth + rng.integers(1, 4, rows)) % 4
    return [
        (REFERENCE, truth, np.clip(sure + 0.1, 0, 0.999)),
        (CHEAP, np.where(agrees, truth, other), np.clip(sure, 0.01, 0.999)),
    ]


ANSWERS = [["red"], [" gre", "en"], ["red", " wine"], [" blue"]]


def made_of(rng: np.random.Generator, answer: int, sure: float) -> Trace:
    pieces = [*ANSWERS[answer], *[" so"] * int(rng.integers(0, 4))]
    own = len(ANSWERS[answer])
    logprobs = [math.log(sure), *[math.log(rng.uniform(0.7, 1)) for _ in pieces[1:]]]
    # After the answer the text might have ended at each token.
    end = [*[0.01] * own, *rng.uniform(0.1, 0.5, len(pieces) - own).tolist(), float(rng.uniform(0.6, 1))]
    return trace_of(list(range(len(pieces))), pieces, logprobs, end, prompt=20)


def chosen(traces: dict[str, list[Trace]], rows: np.ndarray) -> dict[str, list[Trace]]:
    return {name: [own[row] for row in rows] for name, own in traces.items()}


def problem_of(validation: int = 600, calibration: int = 1000, **terms: Any) -> TextProblem:
    traces = population(validation + calibration)
    return TextProblem(
        REFERENCE,
        [TextCandidate(name, COSTS[name], own[:validation], own[validation:]) for name, own in traces.items()],
        EXTRACT,
        **terms,
    )


def test_certified_points_are_cheaper_and_what_they_say_they_are():
    problem = problem_of()
    found = certify_texts(problem, (0.02, 0.05))
    assert [point.id for point in found.points] == ["within-0.02", "within-0.05"]
    held_out = tables_of(problem, "calibration")
    costs = []
    for point in found.points:
        proof, text = point.certificate, point.text
        assert text is not None
        errors = sum(
            replay_steps([dict_of(problem)[step.variant][row] for step in point.steps], point.steps, EXTRACT)[-1].answer
            != answer
            for row, answer in enumerate(problem.answers("calibration"))
        )
        assert (proof.errors, proof.rows) == (errors, 1000)
        assert proof.upper_bound <= proof.alpha
        assert text.cost_ms == pytest.approx(point.expected_cpu_ms)
        assert text.disagreement == pytest.approx(point.tuned_disagreement)
        assert text.cost_ms < 0.7 * text.reference_cost_ms
        # Both variants are stopped early, and the cheap one answers most.
        assert sum(text.tokens) < text.reference_tokens
        assert figures(point.steps, held_out, REFERENCE).errors == errors
        costs.append(text.cost_ms)
    assert costs == sorted(costs, reverse=True)
    assert "int4 (" in found.notes[1]


def dict_of(problem: TextProblem) -> dict[str, list[Trace]]:
    return {candidate.id: list(candidate.calibration) for candidate in problem.candidates}


def test_the_promise_is_kept_and_the_naive_rule_breaks_it():
    """A path is planned on some rows; many calibrations are drawn; what each chooses is judged on all there are."""
    alpha, delta, rows, runs = 0.05, 0.05, 400, 400
    everywhere = tables_with(population(4000))
    broken = naive_broken = certified = total = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        tuning = tables_with(chosen(population(4000), rng.choice(4000, 500, replace=False)))
        # Planned for a looser level, so that the path leads well beyond this one.
        path = plan(tuning, REFERENCE, (1.5 * alpha,))[1.5 * alpha]
        wrong = np.stack([evaluate(policy.steps, everywhere).wrong for policy in path])
        risks = wrong.mean(axis=1)
        assert risks.min() < alpha < risks.max(), "otherwise the test is too easy"
        for _ in range(runs):
            errors = wrong[:, rng.choice(4000, rows)].sum(axis=1).tolist()
            passed = fixed_sequence(errors, rows, alpha, delta)
            naive = [number for number, count in enumerate(errors) if count <= alpha * rows]
            total += 1
            certified += passed > 0
            broken += passed > 0 and risks[passed - 1] > alpha
            naive_broken += bool(naive) and risks[naive[-1]] > alpha
    assert certified > 0.9 * total
    # Three standard deviations of a share of 5 %.
    assert broken / total <= delta + 3 * math.sqrt(delta * (1 - delta) / total)
    assert naive_broken / total > 0.25


def test_the_search_is_as_good_as_trying_all_thresholds_of_one_cascade():
    tables = tables_with(chosen(population(1600), np.arange(400)))
    budget = 0.03
    best = search(tables, REFERENCE, [budget])
    assert len(best) == 1
    again = evaluated(best[0].steps, tables)
    assert again.disagreement == pytest.approx(best[0].disagreement)
    assert best[0].disagreement <= budget
    cheap = tables[CHEAP].ends(ALL_THE_WAY)
    sums = cheap.features[:, FEATURES.index("sum")]
    costs = []
    for accept in np.unique(sums):
        taken = sums >= accept
        if (taken & cheap.wrong).mean() <= budget:
            cost = tables[CHEAP].cost_ms(cheap.drawn)
            onward = tables[REFERENCE].cost_ms(tables[REFERENCE].ends(ALL_THE_WAY).drawn)
            costs.append(float((cost + np.where(taken, 0, onward)).mean()))
    # Beyond this cascade it stops texts early.
    assert best[0].cost_ms < min(costs)


def test_giving_up_costs_less_and_changes_no_more():
    tables = tables_with(chosen(population(1600), np.arange(600)))
    budgets = [share * 0.02 for share in BUDGETS]
    cheaper = 0
    for policy in search(tables, REFERENCE, budgets):
        before, after = evaluated(policy.steps, tables), give_up(policy, tables)
        assert after.cost_ms <= before.cost_ms
        if after.steps != policy.steps:
            cheaper += after.cost_ms < before.cost_ms
            assert after.steps[0].text.floors  # type: ignore[union-attr]
            assert after.steps[1:] == policy.steps[1:]
        if all(step.text is None for step in policy.steps[1:]):
            assert after.disagreement <= before.disagreement
    assert cheaper


def test_paths_go_from_conservative_to_aggressive():
    paths = plan(tables_of(problem_of(), "validation"), REFERENCE, (0.01, 0.05))
    for alpha, path in paths.items():
        costs = [policy.cost_ms for policy in path]
        assert costs == sorted(costs, reverse=True)
        assert all(policy.disagreement <= 1.1 * alpha + 1e-9 for policy in path)


def test_where_answers_are_not_read_while_serving_no_point_stops_at_one():
    tables = tables_of(problem_of(300, 1, stops_at_answers=False), "validation")
    policies = search(tables, REFERENCE, [share * 0.05 for share in BUDGETS])
    texts = [step.text for policy in policies for step in policy.steps if step.text is not None]
    assert any(text.end is not None for text in texts)
    assert all(text.answer is None for text in texts)


def test_levels_without_a_point_say_why():
    few = certify_texts(problem_of(400, 50), (0.01,))
    assert few.points == []
    assert few.levels[0].rows_needed == 299
    unsteady = certify_texts(problem_of(400, 400, self_changed=0.03), (0.02,))
    assert unsteady.points == []
    assert "disagrees with itself" in str(unsteady.levels[0].reason)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "bf16"}, "not among the candidates"),
        ({"candidates": "twice"}, "one name"),
        ({"candidates": "short"}, "a trace of every row"),
        ({"candidates": "empty"}, "a trace of every row"),
    ],
)
def test_problems_that_do_not_fit_are_refused(change: dict, message: str):
    traces = population(1600)
    own = [TextCandidate(name, COSTS[name], traces[name][:5], traces[name][5:9]) for name in (REFERENCE, CHEAP)]
    lists = {
        "twice": [own[0], own[0]],
        "short": [own[0], TextCandidate(CHEAP, COSTS[CHEAP], own[1].validation, own[1].calibration[:-1])],
        "empty": [TextCandidate(REFERENCE, COSTS[REFERENCE], own[0].validation, [])],
    }
    candidates = lists.get(change.get("candidates", ""), own)
    with pytest.raises(PassError, match=message):
        certify_texts(TextProblem(change.get("reference", REFERENCE), candidates, EXTRACT))


def test_a_point_in_words():
    steps = [
        Step(
            variant="int4",
            gates=[Gate(threshold=0.8125)],
            text=TextGates(
                end=EndGate(threshold=0.25),
                answer=AnswerGate(threshold=0.93, stable=2),
                score=SCORES[0],
                floors=[Floor(after=1, score=0.5), Floor(after=4, score=0.5)],
            ),
        ),
        Step(variant="fp32", gates=[Gate(threshold=0.0)]),
    ]
    assert text_in_words(steps) == "int4 (end 0.250, answer 0.930 x2, accept 0.812, give up after 1, 4) > fp32"


def test_the_reference_answers_by_its_whole_texts():
    assert problem_of(3, 4).answers("validation") == [EXTRACT(trace.text) for trace in population(7)[REFERENCE][:3]]
    assert all(answer.found for answer in problem_of(3, 4).answers("calibration"))


def test_errors_are_counted_against_the_truth_where_the_reference_only_stands_for_it():
    problem = problem_of(30, 60)
    truth = problem.answers("calibration")
    truth[:7] = [replace(answer, value=f"{answer.value}!") for answer in truth[:7]]
    told = replace(problem, truth={"validation": problem.answers("validation"), "calibration": truth})
    alone = (Step(variant=REFERENCE, gates=[Gate(threshold=0.0)]),)
    assert not evaluate(alone, tables_of(problem, "calibration")).wrong.any()
    assert evaluate(alone, tables_of(told, "calibration")).wrong.tolist() == [True] * 7 + [False] * 53
    assert not evaluate(alone, tables_of(told, "validation")).wrong.any()
