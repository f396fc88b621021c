"""The engine of most tests, by its own definition: stages, exits, and answers that it corrupts on purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from fettle.points import NEVER
from fettle.rows import Exits, Row, Rows
from tests.fakes import FakeVariant, make_fake_family
from workers.engine import Engine, open_engine
from workers.fake import expected, read_at

WIDTH = 3


def engine(tmp_path: Path, **changes: object) -> Engine:
    family = make_fake_family(tmp_path / "family", variants=[FakeVariant(**changes)])  # type: ignore[arg-type]
    return open_engine(family.variant_path("fake"))


def rows(count: int = 20) -> list[Row]:
    chance = np.random.default_rng(4)
    return [Row(chance.integers(4, 250, chance.integers(1, 30)).astype(np.int32)) for _ in range(count)]


def exits(thresholds: list[list[float]], temperature: float = 1.0) -> Exits:
    table = np.array(thresholds, np.float32)
    return Exits(table, np.full_like(table, temperature))


def margin(ids: np.ndarray, temperature: float) -> float:
    top = np.sort(softmax(expected(ids, WIDTH).astype(np.float64) / temperature))
    return float(top[-1] - top[-2])


def test_an_answer_depends_on_the_row_alone(tmp_path):
    fake = engine(tmp_path)
    together = fake.run(Rows.of(rows()))
    for index, row in enumerate(rows()):
        assert np.array_equal(fake.run(Rows.of([row])).values[0], together.values[index])
        assert np.array_equal(together.values[index], expected(row.ids, WIDTH))
    assert together.stages is None


def test_a_variant_may_read_less(tmp_path):
    values = engine(tmp_path, tokens_read=2).run(Rows.of(rows())).values
    assert np.array_equal(values, [expected(row.ids[:2], WIDTH) for row in rows()])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_each_row_leaves_at_the_first_stage_whose_score_reaches_its_own_threshold(tmp_path, temperature):
    fake = engine(tmp_path, stages=3)
    chance = np.random.default_rng(1)
    thresholds = chance.choice([0.0, 0.1, 0.3, 0.7, NEVER], (20, 2))
    found = fake.run(Rows.of(rows()), exits(thresholds.tolist(), temperature))
    assert found.stages is not None
    assert found.scores is not None
    for index, row in enumerate(rows()):
        read = [row.ids[: read_at(len(row), stage, 3)] for stage in range(3)]
        scores = [margin(ids, temperature) for ids in read[:2]]
        stage = next((n for n in range(2) if scores[n] >= thresholds[index, n]), 2)
        assert found.stages[index] == stage
        assert np.array_equal(found.values[index], expected(read[stage], WIDTH))
        # Scores that were not needed were not looked at.
        seen = ~np.isnan(found.scores[index])
        assert seen.tolist() == [True, stage >= 1]
        assert found.scores[index][seen] == pytest.approx(np.array(scores)[seen], abs=1e-5)
    assert len(set(found.stages.tolist())) == 3


def test_without_exits_every_row_goes_to_the_last_stage(tmp_path):
    found = engine(tmp_path, stages=2).run(Rows.of(rows()))
    assert found.stages is not None
    assert set(found.stages.tolist()) == {1}
    assert found.scores is None
    assert np.array_equal(found.values, [expected(row.ids, WIDTH) for row in rows()])


def test_every_so_manyth_answer_has_another_label_first(tmp_path):
    fake = engine(tmp_path, corrupt_every=4)
    batches = [rows()[:5], rows()[5:6], rows()[6:]]
    values = np.concatenate([fake.run(Rows.of(batch)).values for batch in batches])
    truth = np.stack([expected(row.ids, WIDTH) for row in rows()])
    differs = values.argmax(axis=1) != truth.argmax(axis=1)
    assert np.flatnonzero(differs).tolist() == [3, 7, 11, 15, 19]
