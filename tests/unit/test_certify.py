"""The search for operating points and their certificates, recomputed from the recorded outputs by other means."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.certificates import population, simulate_whole
from fettle import certificates
from fettle.answers import Floats, disagreements
from fettle.errors import PassError
from fettle.manifest import Gate, Head, Step, Task, TaskKind
from fettle.points import NEVER, replay
from optimize.certify import BUDGETS, Candidate, Certified, Problem, certify, in_words, label_disagreement, path, tune
from optimize.grading import Graded, Truth, bins, expected_cost, fit_temperature, grade, worst_errors
from optimize.thresholds import Policy, cheapest, search
from tests.fakes import classify_task, embed_task

TASK = classify_task(["a", "b", "c", "d"])
MULTI = TASK.model_copy(update={"head": Head.MULTI_LABEL})
NUMBER = Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, labels=["score"], width=1)
COSTS = {"exits": (1.0, 1.0, 1.5), "int8": (1.2,), "full": (4.0,)}
NOISE = {"exits": (1.5, 0.6, 0.1), "int8": (0.25,), "full": (1e-6,)}


def noisy(rng: np.random.Generator, values: Floats, noise: tuple[float, ...]) -> Floats:
    """Outputs [rows, stages, width] that are the reference's and noise."""
    return np.stack([values + rng.normal(0, level, values.shape) for level in noise], axis=1).astype(np.float32)


def problem_of(rows: int = 2000, *, calibration: int = 2500, task: Task = TASK, batchings: int = 1, seed: int = 0):
    """`int8` is tried in so many batchings, which move its outputs a little."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(0, 3, (count, task.width)).astype(np.float32) for count in (rows, calibration)]
    candidates = []
    for name, noise in NOISE.items():
        traces = [noisy(rng, split, noise) for split in values]
        tries = batchings if name == "int8" else 1
        moved = [
            [t + rng.normal(0, 0.05, t.shape).astype(np.float32) * (tries > 1) for _ in range(tries)] for t in traces
        ]
        candidates.append(Candidate(name, COSTS[name], *moved))
    return Problem(task, "full", candidates, *values)


def stages_of(problem: Problem) -> dict[str, list[Graded]]:
    truth = Truth(problem.validation, problem.task)
    return {one.id: grade(one.id, one.stage_cpu_ms, one.validation, truth) for one in problem.candidates}


def steps_of(stages: dict[str, list[Graded]], *names: str, at: float = 0.5) -> list[Step]:
    return [
        Step(variant=name, gates=[Gate(threshold=at, temperature=stage.temperature) for stage in stages[name]])
        for name in names
    ]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of()


@pytest.fixture(scope="module")
def certified(problem: Problem) -> Certified:
    return certify(problem)


# Grading


def test_the_temperature_that_made_the_labels_is_found() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 4)).astype(np.float32)
    # The first label of logits with Gumbel noise is drawn from their softmax.
    drawn = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    reference = np.eye(4, dtype=np.float32)[drawn]
    assert fit_temperature(logits * 3, reference, TASK) == pytest.approx(3, rel=0.05)
    assert fit_temperature(logits * 0.5, reference, TASK) == pytest.approx(0.5, rel=0.05)


def test_the_temperature_for_several_labels() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (20_000, 4)).astype(np.float32)
    reference = (logits + rng.logistic(size=logits.shape)).astype(np.float32)
    assert fit_temperature(logits * 2, reference, MULTI) == pytest.approx(2, rel=0.05)


def test_the_temperature_ignores_what_is_not_finite_and_is_one_without_scores() -> None:
    rng = np.random.default_rng(2)
    logits, reference = rng.normal(0, 2, (2, 500, 4)).astype(np.float32)
    broken = np.concatenate([logits, np.full((5, 4), np.nan, np.float32)])
    longer = np.concatenate([reference, reference[:5]])
    assert fit_temperature(broken, longer, TASK) == fit_temperature(logits, reference, TASK)
    assert fit_temperature(broken[-5:], reference[:5], TASK) == 1.0
    assert fit_temperature(logits, reference, embed_task(4)) == 1.0


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.5, 1.0, float("nan")]), min_size=1, max_size=60))
def test_cuts_count_the_rows_that_reach_each_threshold_ties_included(scores: list[float]) -> None:
    array = np.array([scores], np.float32)
    graded = Graded("a", 0, 1.0, 1.0, array, np.zeros(array.shape, bool))
    assert graded.cuts.tolist() == [int((array[0] >= threshold).sum()) for threshold in graded.grid]
    assert graded.grid[0] == NEVER
    assert (np.diff(graded.grid) < 0).all()


def test_bins_are_tenths_of_the_score() -> None:
    scores = np.array([[0.05, 0.06, 0.95, 1.0, np.nan]], np.float32)
    found = bins(Graded("a", 0, 1.0, 1.0, scores, np.array([[True, False, False, False, True]])))
    assert [one.rows for one in found] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert (found[0].agreed, found[9].agreed) == (0.5, 1.0)
    assert found[0].mean_score == pytest.approx(0.055)
    assert (found[9].low, found[9].high) == (0.9, 1.0)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from([("exits",), ("int8", "full"), ("int8", "exits", "full")]), st.floats(0, 1)
)
def test_cost_and_errors_are_those_of_the_replay(seed: int, names: tuple[str, ...], at: float) -> None:
    problem = problem_of(300, calibration=1, seed=seed)
    stages = stages_of(problem)
    steps = steps_of(stages, *names, at=at)
    replayed = replay({one.id: one.validation[0] for one in problem.candidates}, steps, TASK)
    expected = disagreements(replayed.values, problem.validation, TASK)
    np.testing.assert_array_equal(worst_errors(steps, stages), expected)
    # Each row pays for all stages of the variants before its own, and for its own up to where it leaves.
    paid = [
        sum(sum(COSTS[name]) for name in names[:step]) + sum(COSTS[names[step]][: stage + 1])
        for step, stage in zip(replayed.steps.tolist(), replayed.stages.tolist(), strict=True)
    ]
    assert expected_cost(steps, stages) == pytest.approx(np.mean(paid))


def test_errors_are_the_worst_over_the_batchings() -> None:
    problem = problem_of(800, calibration=1, batchings=3)
    stages = stages_of(problem)
    steps = steps_of(stages, "int8", "full", at=0.3)
    tried = product(*(one.validation for one in problem.candidates))
    worst = np.zeros(800, bool)
    for traces in tried:
        named = {one.id: trace for one, trace in zip(problem.candidates, traces, strict=True)}
        worst |= disagreements(replay(named, steps, TASK).values, problem.validation, TASK)
    np.testing.assert_array_equal(worst_errors(steps, stages), worst)
    alone = {
        name: [replace(stage, scores=stage.scores[:1], wrong=stage.wrong[:1]) for stage in one]
        for name, one in stages.items()
    }
    assert worst.sum() > worst_errors(steps, alone).sum()


# Search


@pytest.mark.parametrize("budget", [0.005, 0.01, 0.03])
def test_the_search_comes_close_to_trying_everything(budget: float) -> None:
    problem = problem_of(1500, calibration=1, seed=4)
    stages = {name: stages_of(problem)[name] for name in ("int8", "exits", "full")}
    # Two stages in place of three, so that everything can be tried.
    stages["exits"] = [replace(stages["exits"][1], stage=0), replace(stages["exits"][2], stage=1)]
    found = cheapest(search(stages, "full", [budget], TASK, lambda _: None), budget)
    assert found is not None
    best = np.inf
    for names in (("int8", "full"), ("exits",), ("exits", "full")):
        gates = [stage for name in names for stage in stages[name]][:-1]
        for thresholds in product(*(gate.grid for gate in gates)):
            left = iter([*map(float, thresholds), 0.0])
            steps = [Step(variant=name, gates=[Gate(threshold=next(left)) for _ in stages[name]]) for name in names]
            if worst_errors(steps, stages).mean() <= budget:
                best = min(best, expected_cost(steps, stages))
    assert found.cost_ms <= best * 1.01


def test_every_policy_ends_in_a_gate_that_takes_all(problem: Problem) -> None:
    stages = stages_of(problem)
    policies = search(stages, "full", [0.05], TASK, lambda _: None)
    assert len(policies) > 20
    for policy in policies:
        names = [step.variant for step in policy.steps]
        assert policy.steps[-1].gates[-1].threshold == 0.0
        assert "full" not in names[:-1]
        assert len(set(names)) == len(names) <= 3
        assert policy.disagreement <= 0.05
        assert all(any(gate.threshold <= 1 for gate in step.gates) for step in policy.steps)
        # The last variant is reached by some row.
        reached = replay({one.id: one.validation[0] for one in problem.candidates}, policy.steps, TASK)
        assert len(policy.steps) - 1 in reached.steps


def test_many_variants_are_searched_too() -> None:
    problem = problem_of(400, calibration=1)
    by_name = {one.id: one for one in problem.candidates}
    many = [replace(by_name["int8"], id=f"int8-{n}", stage_cpu_ms=(1.2 + n / 10,)) for n in range(11)]
    done: list[float] = []
    stages = stages_of(replace(problem, candidates=[*many, by_name["full"]]))
    policies = search(stages, "full", [0.05], TASK, done.append)
    assert cheapest(policies, 0.05) is not None
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 0.1)), max_size=40), st.sampled_from([0.01, 0.05]))
def test_a_path_goes_from_conservative_to_aggressive(figures: list[tuple[float, float]], alpha: float) -> None:
    policies = [Policy((), cost, changed) for cost, changed in figures]
    found = path(policies, alpha)
    assert all(one.cost_ms > two.cost_ms and one.disagreement < two.disagreement for one, two in pairwise(found))
    assert all(policy.disagreement <= BUDGETS[-1] * alpha for policy in found)
    within = [cost for cost, changed in figures if changed <= BUDGETS[-1] * alpha]
    assert bool(found) == bool(within)
    assert not found or found[-1].cost_ms == min(within)


# Certificates


def test_points_are_what_their_certificates_say(problem: Problem, certified: Certified) -> None:
    assert [level.alpha for level in certified.levels] == [0.005, 0.01, 0.02, 0.05]
    assert [point.id for point in certified.points] == ["within-0.005", "within-0.01", "within-0.02", "within-0.05"]
    for point in certified.points:
        seen = replay({one.id: one.validation[0] for one in problem.candidates}, point.steps, TASK)
        assert point.tuned_disagreement == disagreements(seen.values, problem.validation, TASK).mean()
        unseen = replay({one.id: one.calibration[0] for one in problem.candidates}, point.steps, TASK)
        errors = int(disagreements(unseen.values, problem.calibration, TASK).sum())
        assert point.certificate == certificates.certify(errors, 2500, point.certificate.alpha, 0.05)
        assert point.certificate.p_value <= 0.05
        assert point.certificate.upper_bound <= point.certificate.alpha
    costs = [point.expected_cpu_ms for point in certified.points]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.5 * COSTS["full"][0]


def test_a_level_shows_every_test_and_ends_at_the_first_failure(certified: Certified) -> None:
    for level, point in zip(certified.levels, certified.points, strict=True):
        passed = [test.certificate.p_value <= 0.05 for test in level.path]
        assert passed == sorted(passed, reverse=True)
        assert passed.count(False) <= 1
        assert level.point == point.id
        last = level.path[passed.count(True) - 1]
        assert (last.certificate, last.label) == (point.certificate, in_words(point.steps))


def test_scores_and_notes_are_there_for_the_report(certified: Certified) -> None:
    assert [(one.variant, one.stage) for one in certified.scores] == [
        ("exits", 0), ("exits", 1), ("exits", 2), ("int8", 0), ("full", 0)
    ]  # fmt: skip
    assert len(certified.notes) == 5


def test_the_calibration_rows_do_not_move_the_search(problem: Problem) -> None:
    other = [replace(one, calibration=[trace[::-1].copy() for trace in one.calibration]) for one in problem.candidates]
    assert tune(problem, [0.01]).policies == tune(replace(problem, candidates=other), [0.01]).policies


def test_all_levels_together_take_a_share_of_delta_each(problem: Problem, certified: Certified) -> None:
    together = certify(problem, simultaneous=True)
    for one, other in zip(certified.points, together.points, strict=True):
        assert other.certificate.delta == pytest.approx(0.0125)
        assert other.certificate.p_value <= 0.0125
        assert other.expected_cpu_ms >= one.expected_cpu_ms


def test_too_few_rows_are_refused_with_the_number_needed() -> None:
    found = certify(problem_of(500, calibration=100))
    for level in found.levels[:3]:
        assert level.point is None
        assert level.rows_needed == certificates.rows_needed(level.alpha, 0.05)
        assert f"it takes {level.rows_needed} at the least" in (level.reason or "")
    assert "answered by the reference" in found.notes[1]


def test_one_row_certifies_nothing() -> None:
    found = certify(problem_of(1, calibration=1))
    assert found.points == []
    assert all(level.rows_needed for level in found.levels)


def test_no_level_below_the_references_own_noise(problem: Problem) -> None:
    found = certify(replace(problem, self_changed=0.007), [0.005, 0.01])
    assert found.levels[0].reason == "the reference disagrees with itself on 0.70% of the rows, in other batches"
    assert [point.id for point in found.points] == ["within-0.01"]


def wrong_on(trace: Floats, share: float) -> Floats:
    changed = trace.copy()
    changed[: int(share * len(trace))] *= -1
    return changed


def test_a_failure_at_the_conservative_end_ends_the_path() -> None:
    """Only the reference is within the first budgets, and it fails on calibration: the cheap one is not even tried."""
    problem = problem_of()
    exits, int8, full = problem.candidates
    broken = replace(full, calibration=[wrong_on(full.calibration[0], 0.3)])
    sound = replace(int8, validation=[wrong_on(full.validation[0], 0.004)], calibration=full.calibration)
    found = certify(replace(problem, candidates=[sound, broken]), [0.01])
    (level,) = found.levels
    assert level.point is None
    assert len(level.path) == 1
    assert level.path[0].certificate.errors > 200
    assert "failed its test" in (level.reason or "")
    assert exits.id not in level.path[0].label


def test_nothing_within_the_level_on_validation() -> None:
    problem = problem_of()
    full = problem.candidates[-1]
    found = certify(
        replace(problem, candidates=[replace(full, validation=[wrong_on(full.validation[0], 0.2)])]), [0.01]
    )
    assert found.levels[0].reason == "no variant stays within this level on the validation rows"


def test_all_rows_wrong() -> None:
    problem = problem_of(400, calibration=400)
    worst = [
        replace(one, validation=[-t for t in one.validation], calibration=[-t for t in one.calibration])
        for one in problem.candidates
    ]
    assert certify(replace(problem, candidates=worst)).points == []


def test_values_that_are_not_numbers_go_to_the_reference() -> None:
    problem = problem_of()
    _, int8, full = problem.candidates
    holes = [trace.copy() for trace in (int8.validation[0], int8.calibration[0])]
    for trace in holes:
        trace[::10] = np.nan
    found = certify(
        replace(problem, candidates=[replace(int8, validation=holes[:1], calibration=holes[1:]), full]), [0.01]
    )
    (point,) = found.points
    assert [step.variant for step in point.steps] == ["int8", "full"]
    replayed = replay({"int8": holes[1], "full": full.calibration[0]}, point.steps, TASK)
    assert (replayed.steps[::10] == 1).all()


def test_scores_that_all_tie() -> None:
    """One sure answer for all rows: nothing can be told apart, so all of it is taken or none."""
    problem = problem_of(700, calibration=700)
    full = problem.candidates[-1]
    flat = [np.tile(np.array([[[9, 0, 0, 0]]], np.float32), (700, 1, 1))]
    found = certify(replace(problem, candidates=[Candidate("flat", (0.1,), flat, flat), full]), [0.01])
    assert [step.variant for step in found.points[0].steps] == ["full"]


def test_variants_that_depend_on_their_batch_are_certified_on_the_worst() -> None:
    problem = problem_of(batchings=3)
    found = certify(problem)
    used = {point.id: {step.variant for step in point.steps} for point in found.points}
    assert any("int8" in names for names in used.values())
    for point in found.points:
        assert (point.certificate.batchings == "any") == ("int8" not in used[point.id])


def test_without_exits_and_without_others_the_reference_is_the_point(problem: Problem) -> None:
    found = certify(replace(problem, candidates=problem.candidates[-1:]))
    assert [[step.variant for step in point.steps] for point in found.points] == [["full"]] * 4


def test_several_labels_have_exits_too() -> None:
    found = certify(problem_of(task=MULTI, seed=5), [0.05])
    (point,) = found.points
    assert point.expected_cpu_ms < COSTS["full"][0]


@pytest.mark.parametrize("task", [NUMBER, embed_task(6)])
def test_numbers_and_vectors_have_single_variants(task: Task) -> None:
    rng = np.random.default_rng(0)
    splits = [rng.normal(0, 1, (1500, task.width)).astype(np.float32) for _ in range(2)]
    spread = 0.023 if task is NUMBER else 0.06
    named = {"full": 1e-6, "good": spread, "bad": 4 * spread}
    candidates = [
        Candidate(name, (cost,), *([noisy(rng, split, (noise,))] for split in splits))
        for (name, noise), cost in zip(named.items(), (4.0, 2.0, 1.0), strict=True)
    ]
    found = certify(Problem(task, "full", candidates, *splits), [0.005, 0.05])
    assert [[step.variant for step in point.steps] for point in found.points] == [["full"], ["good"]]
    assert found.scores == []
    assert all(len(point.steps) == 1 for point in found.points)


def test_the_floor_of_the_cosine_is_a_parameter() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (500, 6)).astype(np.float32)
    full, rough = values[:, None], noisy(rng, values, (0.3,))
    candidates = [Candidate("full", (4.0,), [full], [full]), Candidate("rough", (1.0,), [rough], [rough])]
    strict = certify(Problem(embed_task(6), "full", candidates, values, values), [0.05])
    loose = certify(Problem(embed_task(6), "full", candidates, values, values, cosine_floor=0.5), [0.05])
    assert [found.points[0].steps[0].variant for found in (strict, loose)] == ["full", "rough"]


def test_arrays_that_do_not_fit_are_named(problem: Problem) -> None:
    full = problem.candidates[-1]
    with pytest.raises(PassError, match="'full' is not among the candidates exits, int8"):
        certify(replace(problem, candidates=problem.candidates[:2]))
    with pytest.raises(
        PassError, match=r"full: calibration should hold arrays of shape \(2500, 1, 4\), found \(5, 1, 4\)"
    ):
        certify(replace(problem, candidates=[replace(full, calibration=[full.calibration[0][:5]])]))
    with pytest.raises(PassError, match=r"full: validation .* found nothing"):
        certify(replace(problem, candidates=[replace(full, validation=[])]))
    with pytest.raises(PassError, match="two candidates have one name"):
        certify(replace(problem, candidates=[full, full]))


def test_points_in_words() -> None:
    steps = [
        Step(variant="exits", gates=[Gate(threshold=0.78), Gate(threshold=NEVER), Gate(threshold=0.4123)]),
        Step(variant="full", gates=[Gate(threshold=0.0)]),
    ]
    assert in_words(steps) == "exits (0.780, never, 0.412) > full"


def test_label_disagreement_is_by_the_references_label() -> None:
    reference = np.array([[1, 0, 0, 0], [2, 1, 0, 0], [0, 3, 0, 0]], np.float32)
    found = label_disagreement(reference, {"cheap": np.array([True, False, False])}, TASK)
    assert [(one.label, one.rows, one.changed) for one in found] == [("a", 2, {"cheap": 0.5}), ("b", 1, {"cheap": 0.0})]
    several = label_disagreement(reference, {"cheap": np.array([True, False, False])}, MULTI)
    assert [(one.label, one.rows) for one in several] == [("a", 2), ("b", 2)]
    assert label_disagreement(reference, {}, embed_task(4)) == []


def test_the_promise_holds_on_the_whole_population() -> None:
    everyone = population(20_000, np.random.default_rng(0))
    tally = simulate_whole(everyone, 0.05, 0.05, (800, 1200), 12, 0)
    # More than four of twelve would happen once in five thousand.
    assert tally.certified == 12
    assert tally.broken <= 4
    assert tally.mean_cost_ms is not None
    assert tally.mean_cost_ms < 4
