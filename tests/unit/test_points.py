"""The walk through an operating point: with engines and from records, against a plain loop over single rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from fettle.answers import Floats
from fettle.certificates import certify
from fettle.errors import FamilyError
from fettle.manifest import Gate, Head, OperatingPoint, Stage, Step, Task, TaskKind
from fettle.points import NEVER, accepts, answer, check_steps, choose_point, exits, has_scores, replay, scores_at, whole
from fettle.policy import passes
from fettle.rows import Exits, Outputs, Row, Rows
from tests.fakes import FakeVariant, classify_task, embed_task, make_fake_family

TASK = classify_task(["a", "b", "c", "d"])
MULTI = TASK.model_copy(update={"head": Head.MULTI_LABEL})


class Staged:
    """Answers from recorded outputs [rows, stages, width]; a row's first token is its number. One row at a time."""

    def __init__(self, trace: Floats, task: Task) -> None:
        self.trace, self.task = trace, task
        self.asked: list[int] = []

    def run(self, rows: Rows, exits: Exits | None = None) -> Outputs:
        starts = np.cumsum(rows.lengths) - rows.lengths
        numbers = rows.ids[starts]
        self.asked += numbers.tolist()
        last = self.trace.shape[1] - 1
        stages = np.array([self._leaves(number, row, exits, last) for row, number in enumerate(numbers)], np.int8)
        return Outputs(self.trace[numbers, stages], 0.0, stages if last else None)

    def _leaves(self, number: int, row: int, given: Exits | None, last: int) -> int:
        for stage in range(last if given is not None else 0):
            assert given is not None
            gate = Gate(threshold=0.0, temperature=float(given.temperatures[row, stage]))
            if scores_at(self.trace[number : number + 1, stage], self.task, gate)[0] >= given.thresholds[row, stage]:
                return stage
        return last


def rows_of(count: int) -> list[Row]:
    """Of various lengths, so that batches are put together in another order than the rows'."""
    return [Row(np.array([number] + [1] * (number * 7 % 5), np.int32)) for number in range(count)]


def make_traces(seed: int, count: int, stages: dict[str, int]) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    # Few distinct values, so that scores tie with each other and with the thresholds.
    return {name: rng.integers(-2, 3, (count, n, TASK.width)).astype(np.float32) for name, n in stages.items()}


def point(steps: list[Step], alpha: float = 0.01, cost: float = 1.0) -> OperatingPoint:
    return OperatingPoint(
        id=f"within-{alpha:g}-{cost:g}",
        steps=steps,
        certificate=certify(0, 1000, alpha, 0.05),
        expected_cpu_ms=cost,
        tuned_disagreement=0.0,
    )


def plain_loop(traces: dict[str, Floats], steps: list[Step], row: int) -> tuple[int, int]:
    """Which step and stage answers a row, by the definition: the first gate that its margin reaches."""
    for number, step in enumerate(steps):
        for stage, gate in enumerate(step.gates):
            logits = traces[step.variant][row, stage].astype(np.float64) / gate.temperature
            top = np.sort(softmax(logits))
            if not np.isnan(top).any() and np.float32(top[-1] - top[-2]) >= np.float32(gate.threshold):
                return number, stage
    return len(steps) - 1, len(steps[-1].gates) - 1


thresholds = st.sampled_from([0.0, 0.05, 0.2, 0.4, 0.61, 1.0, NEVER])
gates = st.builds(Gate, threshold=thresholds, temperature=st.sampled_from([0.3, 1.0, 2.5]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 40), st.data())
def test_answering_replaying_and_the_plain_loop_agree(seed: int, count: int, data: st.DataObject) -> None:
    stages = {"small": 1, "exits": 3, "full": 2}
    traces = make_traces(seed, count, stages)
    traces["exits"][::7, 1] = np.nan
    names = data.draw(st.permutations(list(stages)))[: data.draw(st.integers(1, 3))]
    steps = [Step(variant=name, gates=[data.draw(gates) for _ in range(stages[name])]) for name in names]
    served = answer(rows_of(count), steps, {name: Staged(trace, TASK) for name, trace in traces.items()}, TASK)
    recorded = replay(traces, steps, TASK)
    for left, right in zip(
        (served.values, served.steps, served.stages, served.scores),
        (recorded.values, recorded.steps, recorded.stages, recorded.scores),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    expected = [plain_loop(traces, steps, row) for row in range(count)]
    assert list(zip(served.steps.tolist(), served.stages.tolist(), strict=True)) == expected
    for row, (number, stage) in enumerate(expected):
        np.testing.assert_array_equal(served.values[row], traces[steps[number].variant][row, stage])


def test_an_engine_sees_only_what_is_left() -> None:
    trace = np.zeros((4, 1, 4), np.float32)
    trace[[0, 2], 0, 0] = 9.0  # sure
    engines = {"small": Staged(trace, TASK), "full": Staged(trace, TASK)}
    steps = [Step(variant="small", gates=[Gate(threshold=0.9)]), Step(variant="full", gates=[Gate(threshold=0.0)])]
    answered = answer(rows_of(4), steps, engines, TASK)
    assert answered.steps.tolist() == [0, 1, 0, 1]
    assert sorted(engines["full"].asked) == [1, 3]


def test_a_step_without_work_is_not_run() -> None:
    trace = np.full((3, 1, 4), 1.0, np.float32)
    steps = [Step(variant="small", gates=[Gate(threshold=0.0)]), Step(variant="full", gates=[Gate(threshold=0.0)])]
    assert answer(rows_of(3), steps, {"small": Staged(trace, TASK)}, TASK).steps.tolist() == [0, 0, 0]


def test_no_rows() -> None:
    answered = answer([], [Step(variant="a", gates=[Gate(threshold=0.0)])], {}, TASK)
    assert answered.values.shape == (0, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_goes_on_and_is_answered_at_the_end(bad: float) -> None:
    trace = np.full((1, 2, 4), bad, np.float32)
    steps = [Step(variant="a", gates=[Gate(threshold=0.0)] * 2), Step(variant="b", gates=[Gate(threshold=0.5)] * 2)]
    answered = replay({"a": trace, "b": trace}, steps, TASK)
    assert (answered.steps[0], answered.stages[0]) == (1, 1)
    assert np.isnan(answered.scores[0])


def test_vectors_pass_without_scores() -> None:
    task = embed_task(4)
    trace = np.ones((3, 1, 4), np.float32)
    answered = replay({"a": trace}, [Step(variant="a", gates=[Gate(threshold=0.0)])], task)
    np.testing.assert_array_equal(answered.values, trace[:, 0])
    assert np.isnan(answered.scores).all()


def test_a_tie_with_the_threshold_passes_and_nan_does_not() -> None:
    assert passes(np.array([0.5, 0.49, np.nan], np.float32), 0.5).tolist() == [True, False, False]
    # As a float64 the threshold lies above the score that it was taken from.
    score = np.float32(0.1)
    assert passes(np.array([score]), 0.1).tolist() == [True]


def test_the_temperature_changes_the_score() -> None:
    values = np.array([[2.0, 0.0, 0.0, 0.0]], np.float32)
    assert accepts(values, TASK, Gate(threshold=0.6)).tolist() == [True] == [0.711 - 0.096 > 0.6]
    assert accepts(values, TASK, Gate(threshold=0.6, temperature=2.0)).tolist() == [False]
    assert accepts(values, MULTI, Gate(threshold=0.0)).tolist() == [True]


@pytest.mark.parametrize(
    ("task", "scored"),
    [
        (TASK, True),
        (MULTI, True),
        (embed_task(), False),
        (Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, width=1), False),
        (Task(kind=TaskKind.CLASSIFY, head=Head.SINGLE_LABEL, width=1), False),
    ],
)
def test_which_tasks_have_scores(task: Task, scored: bool) -> None:
    assert has_scores(task) is scored
    values = np.ones((2, task.width), np.float32)
    assert np.isnan(scores_at(values, task, Gate(threshold=0.0))).all() == (not scored)


def test_exits_are_one_row_of_thresholds_each() -> None:
    step = Step(variant="a", gates=[Gate(threshold=0.7, temperature=2.0), Gate(threshold=NEVER), Gate(threshold=0.3)])
    found = exits(step, 3)
    assert found is not None
    np.testing.assert_array_equal(found.thresholds, np.array([[0.7, NEVER]] * 3, np.float32))
    np.testing.assert_array_equal(found.temperatures, np.array([[2.0, 1.0]] * 3, np.float32))
    assert found.thresholds.dtype == found.temperatures.dtype == np.float32


def test_no_exits_where_none_can_be_taken() -> None:
    assert exits(Step(variant="a", gates=[Gate(threshold=0.3)]), 2) is None
    assert exits(Step(variant="a", gates=[Gate(threshold=NEVER), Gate(threshold=0.3)]), 2) is None


STEP = [Step(variant="a", gates=[Gate(threshold=0.0)])]


def test_the_cheapest_admissible_point_is_chosen() -> None:
    strict, middle, loose = point(STEP, 0.005, 9.0), point(STEP, 0.01, 5.0), point(STEP, 0.05, 2.0)
    points = [loose, strict, middle]
    assert choose_point(points, 0.005) is strict
    assert choose_point(points, 0.01) is middle
    assert choose_point(points, 0.04) is middle
    assert choose_point(points, 1.0) is loose


def test_a_stricter_point_that_is_cheaper_wins() -> None:
    strict, loose = point(STEP, 0.005, 2.0), point(STEP, 0.05, 3.0)
    assert choose_point([loose, strict], 0.05) is strict


def test_without_an_admissible_point_the_reference_answers() -> None:
    assert choose_point([point(STEP, 0.01)], 0.0) is None
    assert choose_point([point(STEP, 0.01)], 0.009) is None
    assert choose_point([], 0.5) is None


def test_a_whole_variant_leaves_no_row_early(tmp_path) -> None:
    variant = make_fake_family(tmp_path).variant("fake")
    assert whole(variant)[0].gates == [Gate(threshold=0.0)]
    staged = variant.model_copy(update={"stages": [Stage(file="a", layers=1), Stage(file="b", layers=2)]})
    (step,) = whole(staged)
    assert len(step.gates) == 2
    assert exits(step, 5) is None


def test_a_point_that_does_not_fit_its_family_is_refused(tmp_path) -> None:
    variants = make_fake_family(tmp_path, variants=[FakeVariant("a")]).variants
    check_steps(STEP, variants)
    with pytest.raises(FamilyError, match="'b', which the family lacks"):
        check_steps([Step(variant="b", gates=[Gate(threshold=0.0)])], variants)
    with pytest.raises(FamilyError, match="2 gates for 'a', not 1"):
        check_steps([Step(variant="a", gates=[Gate(threshold=0.0)] * 2)], variants)
