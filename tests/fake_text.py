"""Valid manifests of text generators without a model (`workers.fake_decoder`). Imports no torch."""

from __future__ import annotations

from fettle.manifest import (
    DecoderSpec,
    PassRecord,
    Precision,
    Runtime,
    Task,
    TaskKind,
    TokenizerSpec,
    VariantManifest,
)
from workers.fake import FAKE_PASS


def fake_manifest(
    id: str = "fake",
    *,
    vocabulary: int = 50,
    context: int = 512,
    end_ids: list[int] | None = None,
    **parameters: object,
) -> VariantManifest:
    """`parameters`: see `workers.fake_decoder.FakeDecoderParameters`."""
    return VariantManifest(
        id=id,
        runtime=Runtime.FAKE,
        precision=Precision.FP32,
        recipe=[PassRecord(name=FAKE_PASS, parameters=parameters, seconds=0.0)],  # type: ignore[arg-type]
        tokenizer=TokenizerSpec(max_length=context, vocabulary=vocabulary, pad_id=0, segments=False),
        task=Task(kind=TaskKind.GENERATE, width=vocabulary, end_ids=end_ids or []),
        files=[],
        decoder=DecoderSpec(layers=2, kv_heads=2, head_dim=8, context=context),
    )
