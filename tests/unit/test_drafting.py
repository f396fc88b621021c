"""Who guesses for whom: what was measured of a family's variants decides."""

from __future__ import annotations

import pytest

from deployments.app import draft_of
from fettle.config import TextConfig
from fettle.drafting import choose_draft, drafted_ms
from fettle.errors import UsageError
from fettle.family import Family
from fettle.manifest import LatencyCell, LatencyTable, Precision, TextQuality, VariantManifest
from tests.fakes import FakeVariant
from tests.texts import make_text_family

TOKENS = 100


def table(batch_1_ms: float, feed: bool = False) -> LatencyTable:
    lengths = (4, 64) if feed else (64,)
    cells = [LatencyCell(batch=1, length=n, median_ms=batch_1_ms * n, p95_ms=batch_1_ms * n) for n in lengths]
    return LatencyTable(device="cpu", threads=1, cells=cells)


def variant(
    base: VariantManifest,
    id: str,
    *,
    step_ms: float,
    right: float = 0.9,
    precision: Precision = Precision.FP32,
    texts: float = TOKENS,
) -> VariantManifest:
    """A step takes `step_ms`, and a token of a prompt a tenth of it."""
    measured = base.measured
    assert measured is not None
    text = TextQuality(
        max_tokens=128,
        tokens=texts,
        token_agreement=right,
        identical_texts=0.5,
        perplexity=2,
        reference_perplexity=2,
        perplexity_tokens=10,
    )
    changed = measured.model_copy(
        update={
            "latency": table(step_ms / 64),
            "prompts": table(step_ms / 10, feed=True),
            "typical_length": 64,
            "quality": measured.quality.model_copy(update={"text": text}),
        }
    )
    return base.model_copy(update={"id": id, "measured": changed, "precision": precision})


@pytest.fixture
def base(tmp_path) -> VariantManifest:
    return make_text_family(tmp_path / "lm").variant("int4")


def test_the_cheapest_way_to_a_token_decides(base):
    whole = variant(base, "fp32", step_ms=10, right=1.0)
    good = variant(base, "int8", step_ms=3, right=0.9)
    fast = variant(base, "int4", step_ms=1, right=0.8)
    wrong = variant(base, "int2", step_ms=0.5, right=0.1)
    family = {each.id: each for each in (whole, good, fast, wrong)}
    assert choose_draft(family, "fp32") == "int4"
    # k guesses of 1 ms and a check of 10 ms give (1 - 0.8^(k+1)) / 0.2 tokens, best for k = 8; 6.4 ms to read a prompt.
    assert drafted_ms(whole, fast) == pytest.approx(18 * 0.2 / (1 - 0.8**9) + 6.4 / 99)
    del family["int4"]
    assert choose_draft(family, "fp32") == "int8"


@pytest.mark.parametrize(
    ("step_ms", "right", "texts"),
    [(9, 0.9, TOKENS), (1, 0.05, TOKENS), (1, 0.9, 2)],
    ids=["hardly cheaper", "hardly ever right", "reads a prompt for two tokens"],
)
def test_no_draft_where_it_does_not_pay(base, step_ms, right, texts):
    pair = [
        variant(base, "fp32", step_ms=10, right=1.0),
        variant(base, "int4", step_ms=step_ms, right=right, texts=texts),
    ]
    assert choose_draft({each.id: each for each in pair}, "fp32") is None


def test_lower_precisions_check_no_guesses(base):
    pair = [
        variant(base, "int8", step_ms=10, precision=Precision.INT8),
        variant(base, "int4", step_ms=1, precision=Precision.INT4),
    ]
    assert choose_draft({each.id: each for each in pair}, "int8") is None


def test_the_configuration_names_one_or_none(tmp_path):
    family: Family = make_text_family(tmp_path, variants=[FakeVariant("whole"), FakeVariant("cheap")])
    assert draft_of(family, "whole", TextConfig(draft="cheap")) == "cheap"
    assert draft_of(family, "cheap", TextConfig(draft="cheap")) is None
    assert draft_of(family, "whole", TextConfig(draft="off")) is None
    assert draft_of(family, "whole", TextConfig()) is None
    with pytest.raises(UsageError, match=r"text.draft.*no variant 'other'.*whole, cheap"):
        draft_of(family, "whole", TextConfig(draft="other"))
