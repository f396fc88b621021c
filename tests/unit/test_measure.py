from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fettle.errors import PassError
from fettle.family import write_manifest
from fettle.manifest import Head, PassRecord, Task, TaskKind, VariantManifest
from fettle.rows import Row
from optimize import measure
from optimize.labels import Targets
from optimize.trial import load_rows, peak_memory_bytes, save_rows
from tests.fakes import HARDWARE, classify_task, embed_task, tokenizer_spec
from workers.fake import expected

TASK = classify_task()
LEAST_PYTHON_BYTES = 10 << 20


def floats(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def targets(*values: int) -> Targets:
    return Targets(np.array([value >= 0 for value in values]), np.array([v for v in values if v >= 0]), None)


def some_rows(count: int = 40) -> list[Row]:
    random = np.random.default_rng(0)
    return [Row(random.integers(10, 250, random.integers(3, 30)).astype(np.int32)) for _ in range(count)]


# Comparing


def test_disagreement_is_the_worst_over_the_batchings() -> None:
    reference = floats([1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0])
    one_of_two = floats([1, 0, 0], [0, 1, 0])
    one_of_four = floats([1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1])
    assert measure.quality(one_of_two, one_of_four, reference, None, TASK).disagreement == 0.5
    assert measure.quality(reference[:2], one_of_four, reference, None, TASK).disagreement == 0.25
    assert measure.quality(reference, reference, reference, None, TASK).disagreement == 0.0


def test_the_largest_difference_is_taken_over_both_batchings() -> None:
    reference = floats([1, 0, 0])
    assert measure.quality(floats([1.5, 0, 0]), reference, reference, None, TASK).max_difference == 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_fail_the_variant(bad: float) -> None:
    reference = floats([1, 0, 0], [1, 0, 0])
    broken = floats([1, 0, 0], [bad, 0, 0])
    with pytest.raises(PassError, match="1 of 3 answers are not finite"):
        measure.quality(reference[:1], broken, reference, None, TASK)


def test_a_value_that_moves_makes_a_variant_batch_dependent() -> None:
    alone = floats([10, 0, 0], [9.999, 10, 0])
    within = measure.batch_invariance(alone, alone + 5e-4, TASK, 32)
    assert within.invariant
    assert within.tolerance == pytest.approx(1e-3, rel=1e-2)
    beyond = measure.batch_invariance(alone, alone + floats([0, 0, 0], [0.01, 0, 0]), TASK, 32)
    assert not beyond.invariant
    assert beyond.changed == 0.5
    assert beyond.max_difference == pytest.approx(0.01, rel=1e-2)


def test_invariance_compares_the_rows_that_ran_alone() -> None:
    mixed = floats([1, 0, 0], [0, 1, 0], [5, 5, 5])
    assert measure.batch_invariance(mixed[:2], mixed, TASK, 32).rows == 2


def test_accuracy_counts_only_known_labels() -> None:
    values = floats([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0])
    name, score = measure.task_metric(values, targets(0, 1, 1, -1), TASK)
    assert name == "accuracy"
    assert score == pytest.approx(2 / 3)


def test_micro_f1_is_that_of_the_textbook() -> None:
    task = TASK.model_copy(update={"head": Head.MULTI_LABEL})
    truth = np.array([[True, False, True], [False, True, False]])
    values = floats([1, 1, 1], [-1, 1, -1])  # 3 right, 1 too many, none missed
    name, score = measure.task_metric(values, Targets(np.ones(2, np.bool_), truth, None), task)
    assert name == "micro-F1"
    assert score == pytest.approx(2 * 3 / (2 * 3 + 1))


def test_spearman_sees_order_only_and_is_undefined_for_constants() -> None:
    task = Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, width=1)
    truth = Targets(np.ones(4, np.bool_), np.array([1.0, 2.0, 3.0, 4.0]), None)
    name, score = measure.task_metric(floats([1], [10], [100], [1000]), truth, task)
    assert name == "Spearman"
    assert score == pytest.approx(1.0)
    assert measure.task_metric(floats([1], [1], [1], [1]), truth, task) == (None, None)


def test_no_metric_without_labels() -> None:
    values = floats([1, 0, 0])
    assert measure.task_metric(values, None, TASK) == (None, None)
    assert measure.task_metric(values, targets(-1), TASK) == (None, None)
    assert measure.task_metric(values, targets(0), embed_task(3)) == (None, None)


def test_vectors_get_a_mean_cosine() -> None:
    reference = floats([1, 0], [0, 1])
    found = measure.quality(reference, floats([1, 0], [1, 1]), reference, None, embed_task(2))
    assert found.mean_cosine == pytest.approx((1 + np.sqrt(0.5)) / 2)
    assert found.disagreement == 0.5


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [(5, [5]), (16, [16]), (17, [16, 17]), (64, [16, 32, 64]), (100, [16, 32, 64, 100])],
)
def test_timed_lengths_reach_the_longest_row(longest: int, lengths: list[int]) -> None:
    assert measure.timed_lengths(longest) == lengths


# Trying, in a real process


def variant(directory: Path, **parameters: float) -> Path:
    directory.mkdir()
    manifest = VariantManifest(
        id="fake",
        runtime="fake",
        precision="fp32",
        recipe=[PassRecord(name="fake", parameters=parameters, seconds=0)],
        tokenizer=tokenizer_spec(),
        task=TASK,
        files=[],
    )
    write_manifest(directory / "manifest.json", manifest)
    return directory


def exam(rows: list[Row], tuning: int = 0) -> measure.Exam:
    answers = np.stack([expected(row.ids, TASK.width) for row in rows])
    return measure.Exam(
        task=TASK,
        rows=rows,
        reference=answers,
        tuning_rows=rows[:tuning],
        tuning_reference=answers[:tuning],
        targets=None,
        threads=1,
        hardware=HARDWARE,
    )


def test_a_faithful_variant_is_measured_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LATENCY_SECONDS", 1.0)
    heard: list[float] = []
    found = measure.measure(variant(tmp_path / "v", ms_per_token=0.01), exam(some_rows()), "0" * 64, heard.append)
    assert (found.quality.rows, found.quality.disagreement, found.quality.max_difference) == (40, 0.0, 0.0)
    assert found.batching.invariant
    assert found.batching.batch == 32
    assert found.peak_memory_bytes > LEAST_PYTHON_BYTES
    assert found.typical_length == np.median([len(row) for row in some_rows()]).astype(int)
    for cell in found.latency.cells:
        # A sleeping engine is never faster than its sleep; how much slower is the machine's business.
        assert cell.p95_ms >= cell.median_ms >= 0.01 * cell.batch * cell.length
    assert heard == sorted(heard)
    assert heard[-1] <= 1.0


def test_tuning_rows_are_compared_apart_from_the_rows_of_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LATENCY_SECONDS", 0.1)
    given = exam(some_rows(), tuning=10)
    other = given.tuning_reference.copy()
    other[:3, 0], other[:3, 1:] = 0, 9
    given = dataclasses.replace(given, tuning_reference=other)
    found = measure.measure(variant(tmp_path / "v"), given, "0" * 64, lambda done: None)
    changed = expected_share(given.tuning_rows, other)
    assert 0 < changed <= 0.3
    assert found.tuned_disagreement == pytest.approx(changed)
    assert (found.quality.rows, found.quality.disagreement) == (40, 0.0)
    assert found.row_cpu_ms is not None
    assert found.row_cpu_ms > 0
    assert found.stage_cpu_ms == []


def expected_share(rows: list[Row], reference: np.ndarray) -> float:
    answers = np.stack([expected(row.ids, TASK.width) for row in rows])
    return float((answers.argmax(axis=1) != reference.argmax(axis=1)).mean())


def test_without_tuning_rows_nothing_is_said_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LATENCY_SECONDS", 0.1)
    found = measure.measure(variant(tmp_path / "v"), exam(some_rows()), "0" * 64, lambda done: None)
    assert found.tuned_disagreement is None


def test_values_that_move_at_an_inner_stage_make_a_variant_batch_dependent() -> None:
    alone = np.stack([floats([1, 0, 0], [0, 1, 0]), floats([5, 0, 0], [0, 5, 0])], axis=1)
    mixed = alone.copy()
    assert measure.batch_invariance(alone, mixed, TASK, 32).invariant
    mixed[0, 0, 0] += 0.5
    found = measure.batch_invariance(alone, mixed, TASK, 32)
    assert not found.invariant
    assert found.changed == 0.0


def test_neighbours_kept_are_counted_and_need_enough_rows() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(60, 8)).astype(np.float32)
    assert measure.neighbour_overlap(3 * vectors, vectors) == 1.0
    assert measure.neighbour_overlap(vectors[:10], vectors[:10]) is None
    other = random.normal(size=(60, 8)).astype(np.float32)
    kept = measure.neighbour_overlap(other, vectors)
    assert kept is not None
    assert kept == pytest.approx(neighbours_kept(other, vectors))
    assert kept < 0.5


def neighbours_kept(values: np.ndarray, reference: np.ndarray) -> float:
    """The same, row by row."""

    def nearest(vectors: np.ndarray, row: int) -> set[int]:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        order = sorted(
            (other for other in range(len(unit)) if other != row), key=lambda other: -unit[other] @ unit[row]
        )
        return set(order[:10])

    return float(np.mean([len(nearest(values, row) & nearest(reference, row)) / 10 for row in range(len(values))]))


def test_cells_that_would_take_too_long_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LATENCY_SECONDS", 0.5)
    found = measure.measure(variant(tmp_path / "v", ms_per_token=0.5), exam(some_rows(16)), "0" * 64, lambda done: None)
    shapes = {(cell.batch, cell.length) for cell in found.latency.cells}
    assert (1, 16) in shapes
    assert (32, max(len(row) for row in some_rows(16))) not in shapes


def test_a_crash_fails_this_variant_alone_and_says_how(tmp_path: Path) -> None:
    rows = some_rows()
    poison = int(rows[20].ids[0])
    with pytest.raises(PassError, match="ended with status 70"):
        measure.measure(variant(tmp_path / "v", exit_on_token=poison), exam(rows), "0" * 64, lambda done: None)


def test_an_error_of_the_engine_is_passed_on(tmp_path: Path) -> None:
    rows = some_rows()
    poison = int(rows[20].ids[0])
    with pytest.raises(PassError, match=f"EngineError.*token {poison}"):
        measure.measure(variant(tmp_path / "v", fail_on_token=poison), exam(rows), "0" * 64, lambda done: None)


def test_the_trial_process_imports_no_torch() -> None:
    code = (
        "import sys, optimize.trial, workers.onnx_encoder; "
        "print([name for name in ('torch', 'transformers', 'scipy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_peak_memory_of_a_child_does_not_count_its_parent() -> None:
    ballast = np.ones(200 << 20, np.uint8)
    code = "from optimize.trial import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 180 << 20
    assert peak_memory_bytes() > ballast.nbytes


def test_rows_survive_the_hand_over(tmp_path: Path) -> None:
    rows = [Row(np.array([1, 2], np.int32)), Row(np.array([3], np.int32), np.array([1], np.int8))]
    save_rows(tmp_path / "rows.npz", rows)
    back = load_rows(tmp_path / "rows.npz")
    assert [row.ids.tolist() for row in back] == [[1, 2], [3]]
    assert [None if row.type_ids is None else row.type_ids.tolist() for row in back] == [[0, 0], [1]]
