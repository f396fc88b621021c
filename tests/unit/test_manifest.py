from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fettle.family import dump_manifest
from fettle.latency import best_rows_per_second, best_tokens_per_call, estimate_ms, full_call_ms
from fettle.manifest import FileRecord, LatencyCell, LatencyTable, Quality, Task, TaskKind, VariantManifest
from tests.fakes import FakeVariant, classify_task, latency_table, tokenizer_spec

BATCHES, LENGTHS = (1, 4, 8, 16, 32), (16, 32, 64, 128)


def table(cells: dict[tuple[int, int], float]) -> LatencyTable:
    return LatencyTable(
        device="cpu",
        threads=1,
        cells=[
            LatencyCell(batch=batch, length=length, median_ms=ms, p95_ms=ms) for (batch, length), ms in cells.items()
        ],
    )


@st.composite
def tables(draw: st.DrawFn) -> LatencyTable:
    """Tables that grow with batch and length; the largest batches may lack the longest rows, as when time ran out."""
    steps = {(batch, length): draw(st.floats(0.01, 10)) for batch in BATCHES for length in LENGTHS}
    limit = draw(st.sampled_from([10**6, 2048, 512]))
    return table(
        {
            (batch, length): sum(ms for (rows, tokens), ms in steps.items() if rows <= batch and tokens <= length)
            for batch in BATCHES
            for length in LENGTHS
            if batch * length <= limit
        }
    )


@given(tables())
def test_the_estimate_is_exact_at_the_cells(measured: LatencyTable) -> None:
    for cell in measured.cells:
        assert estimate_ms(measured, cell.batch, cell.length) == pytest.approx(cell.median_ms)


@given(tables(), st.integers(1, 64), st.integers(1, 512), st.integers(0, 200))
def test_longer_rows_never_cost_less(measured: LatencyTable, batch: int, length: int, more: int) -> None:
    shorter, longer = estimate_ms(measured, batch, length), estimate_ms(measured, batch, length + more)
    assert 0 < shorter <= longer * (1 + 1e-9)


def test_between_the_cells_both_ways() -> None:
    measured = table({(1, 16): 1.0, (1, 32): 3.0, (3, 16): 5.0, (3, 32): 7.0})
    assert estimate_ms(measured, 1, 24) == pytest.approx(2.0)
    assert estimate_ms(measured, 2, 16) == pytest.approx(3.0)
    assert estimate_ms(measured, 2, 24) == pytest.approx(4.0)


def test_beyond_the_cells_time_grows_with_the_tokens() -> None:
    measured = table({(1, 16): 1.0, (1, 32): 2.0, (4, 16): 3.0, (4, 32): 6.0})
    assert estimate_ms(measured, 1, 64) == pytest.approx(4.0)
    assert estimate_ms(measured, 8, 32) == pytest.approx(12.0)
    assert estimate_ms(measured, 8, 64) == pytest.approx(24.0)


def test_below_the_smallest_cell_its_own_time_stands() -> None:
    assert estimate_ms(table({(1, 16): 2.0, (1, 32): 3.0}), 1, 2) == 2.0


def test_a_missing_corner_is_extended_from_its_own_batch_size() -> None:
    assert estimate_ms(table({(1, 16): 1.0, (1, 64): 4.0, (8, 16): 6.0}), 8, 64) == pytest.approx(24.0)


def test_a_full_call_is_of_the_longest_rows_and_no_quicker_than_the_slowest_measured() -> None:
    measured = table({(1, 16): 1.0, (1, 32): 2.0, (4, 16): 3.0, (4, 32): 6.0})
    assert full_call_ms(measured, 8 * 32) == pytest.approx(12.0)
    assert full_call_ms(measured, 1) == max(cell.p95_ms for cell in measured.cells)


def test_the_best_call_is_the_smallest_that_is_nearly_as_fast() -> None:
    # Tokens a second: 8,000, 15,300 and 16,000, so the middle one is within 5 % of the best; then 15,100, which is not.
    assert best_tokens_per_call(table({(1, 16): 2.0, (8, 16): 8.35, (32, 16): 32.0}), 0.0, 16) == 128
    assert best_tokens_per_call(table({(1, 16): 2.0, (8, 16): 8.5, (32, 16): 32.0}), 0.0, 16) == 512


def test_the_cost_of_a_call_makes_larger_calls_best() -> None:
    measured = table({(1, 16): 1.0, (8, 16): 8.0, (32, 16): 32.0})
    assert best_tokens_per_call(measured, 0.0, 16) == 16
    assert best_tokens_per_call(measured, 1.0, 16) == 512


def test_cheap_tokens_of_short_rows_do_not_make_a_small_call_a_good_one() -> None:
    measured = table({(8, 16): 8.0, (32, 16): 32.0, (8, 64): 41.0, (16, 64): 76.0, (32, 64): 152.0})
    # A token takes 62 us in rows of 16, and 80, 74 and 74 in rows of 64.
    assert best_tokens_per_call(measured, 0.0, 64) == 1024
    assert best_tokens_per_call(measured, 0.0, 16) == 128


def test_best_rows_per_second_takes_the_best_batch() -> None:
    assert best_rows_per_second(table({(1, 16): 2.0, (8, 16): 8.0, (32, 16): 64.0}), 16) == pytest.approx(1000.0)


@given(st.integers(1, 64), st.integers(16, 64))
def test_a_linear_engine_is_estimated_exactly(batch: int, length: int) -> None:
    measured = latency_table(FakeVariant(ms_per_token=0.5))
    assert estimate_ms(measured, batch, length) == pytest.approx(0.5 * batch * length)


def variant() -> VariantManifest:
    return VariantManifest(
        id="a", runtime="fake", precision="fp32", recipe=[], tokenizer=tokenizer_spec(), task=classify_task(), files=[]
    )


def test_a_manifest_survives_the_round_trip() -> None:
    manifest = variant()
    assert VariantManifest.model_validate_json(dump_manifest(manifest)) == manifest


def test_equal_manifests_are_equal_bytes() -> None:
    assert dump_manifest(variant()) == dump_manifest(variant())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"runtime": "pickle"}, "runtime"),
        ({"id": "a/b"}, "id"),
        ({"id": "x" * 65}, "id"),
        ({"schema_version": 2}, "schema_version"),
        ({"stranger": 1}, "stranger"),
        ({"fingerprint": "short"}, "fingerprint"),
    ],
)
def test_nonsense_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        VariantManifest.model_validate({**variant().model_dump(), **change})


def test_a_hash_is_sixty_four_hex_digits() -> None:
    with pytest.raises(ValidationError, match="sha256"):
        FileRecord(path="a", sha256="G" * 64, bytes=1)


@pytest.mark.parametrize("share", [-0.01, 1.01, np.nan])
def test_a_share_lies_between_zero_and_one(share: float) -> None:
    with pytest.raises(ValidationError, match="disagreement"):
        Quality(rows=1, disagreement=share, loss="x", max_difference=0)


def test_a_latency_table_has_cells() -> None:
    with pytest.raises(ValidationError, match="cells"):
        LatencyTable(device="cpu", threads=1, cells=[])


def test_size_is_the_sum_of_the_files() -> None:
    records = [FileRecord(path=name, sha256="0" * 64, bytes=size) for name, size in (("a", 3), ("b", 4))]
    assert variant().model_copy(update={"files": records}).size_bytes == 7


def test_a_task_knows_no_other_keys() -> None:
    with pytest.raises(ValidationError, match="label"):
        Task.model_validate({"kind": TaskKind.EMBED, "width": 3, "label": "x"})
