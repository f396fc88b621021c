"""Text generators without a model: manifests for `workers.fake_decoder`, and a tokenizer. Imports no torch."""

from __future__ import annotations

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

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

END, END_ID, BYTES = "<|end|>", 256, 257
# So many of the first tokens are printable ASCII, without the space.
PRINTABLE = 94


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


def byte_tokenizer() -> FastTokenizer:
    """Each byte is a token, the 256 in the order of byte-level BPE's alphabet; then an end token, which is special."""
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = FastTokenizer(BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer
