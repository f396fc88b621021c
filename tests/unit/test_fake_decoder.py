"""The text generator of most tests: its logits are a function of each slot's whole history."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from fettle.errors import EngineError, FamilyError
from fettle.family import MANIFEST_FILE, write_manifest
from fettle.manifest import DecoderSpec, PassRecord, Runtime
from tests.unit.tiny_decoders import VOCABULARY, decoder_manifest
from workers.decoder import Runner
from workers.engine import open_runner
from workers.fake_decoder import FakeRunner, expected

SPEC = DecoderSpec(layers=2, kv_heads=3, head_dim=5, context=32)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return opened(tmp_path)


def opened(directory: Path, **parameters: float) -> Runner:
    recipe = [PassRecord(name="fake", parameters=dict(parameters), seconds=0)]
    write_manifest(directory / MANIFEST_FILE, decoder_manifest(Runtime.FAKE, SPEC, recipe))
    runner = open_runner(directory)
    runner.allocate(3, 20)
    return runner


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_logits_follow_from_the_history(runner):
    found = runner.feed(1, ids(5, 6, 7, 8), 0, 2)
    assert np.array_equal(found, [expected(ids(5, 6, 7), VOCABULARY), expected(ids(5, 6, 7, 8), VOCABULARY)])
    runner.feed(0, ids(1), 0, 0)
    assert np.array_equal(runner.feed(0, ids(2, 3), 1, 1)[0], expected(ids(1, 2, 3), VOCABULARY))
    found = runner.decode(ids(9, 9), ids(3, 4))
    assert np.array_equal(found, [expected(ids(1, 2, 3, 9), VOCABULARY), expected(ids(5, 6, 7, 8, 9), VOCABULARY)])


def test_every_token_and_its_place_counts():
    histories = [ids(5, 6, 7), ids(6, 5, 7), ids(5, 6, 8), ids(5, 6), ids(5, 5, 6, 7), ids(-1, 6, 7), ids(0, 5, 6, 7)]
    rows = np.stack([expected(history, 400) for history in histories])
    assert len(np.unique(rows.argmax(axis=1))) == len(histories)
    assert rows.std() == pytest.approx(6 / np.sqrt(3), rel=0.05)
    assert np.abs(np.corrcoef(rows)[np.triu_indices(len(rows), 1)]).max() < 0.2


def test_copies_and_room(runner):
    runner.feed(0, ids(1, 2, 3, 4), 0, 0)
    runner.copy(0, 2, 3)
    assert np.array_equal(runner.feed(2, ids(9), 3, 1)[0], expected(ids(1, 2, 3, 9), VOCABULARY))
    runner.allocate(4, 25)
    assert np.array_equal(runner.feed(2, ids(8), 4, 1)[0], expected(ids(1, 2, 3, 9, 8), VOCABULARY))
    runner.allocate(1, 2)
    runner.allocate(1, 20)
    assert np.array_equal(runner.feed(0, ids(7), 2, 1)[0], expected(ids(1, 2, 7), VOCABULARY))


def test_a_gap_shows(runner):
    found = runner.feed(0, ids(5), 3, 1)[0]
    assert not np.array_equal(found, expected(ids(5), VOCABULARY))
    assert np.array_equal(found, expected(ids(-1, -1, -1, 5), VOCABULARY))


def test_what_does_not_fit_is_an_error(runner):
    assert runner.bytes_per_token == 4 * 2 * 2 * 3 * 5
    with pytest.raises(EngineError, match="4 slots"):
        runner.feed(3, ids(1), 0, 1)
    with pytest.raises(EngineError, match="21 tokens"):
        runner.decode(ids(1), ids(20))
    with pytest.raises(EngineError, match="context is 32"):
        runner.allocate(1, 33)


def test_takes_its_time_and_fails_where_it_is_told_to(tmp_path):
    slow = opened(tmp_path, ms_per_call=5, ms_per_token=2, fail_on_token=13)
    started = time.perf_counter()
    slow.feed(0, ids(1, 2, 3, 4, 5), 0, 1)
    assert time.perf_counter() - started >= 0.015
    with pytest.raises(EngineError, match="told to fail on token 13"):
        slow.decode(ids(2, 13), ids(5, 0))


def test_variant_that_generates_no_text_is_refused():
    with pytest.raises(FamilyError, match="generates no text"):
        FakeRunner(decoder_manifest(Runtime.FAKE, SPEC).model_copy(update={"decoder": None}))
