"""Which variant guesses ahead for another one, from what was measured of both. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from fettle.latency import estimate_ms
from fettle.manifest import Identifier, Precision, VariantManifest

# Tokens that are guessed at once, in the order in which a replica tries them.
LENGTHS = (4, 8, 2)
# Of the time that a token takes without guesses; a draft model also takes memory.
WORTH = 0.8


def choose_draft(variants: Mapping[Identifier, VariantManifest], variant: Identifier) -> Identifier | None:
    """The cheaper variant whose guesses make most of `variant`, which decodes one text alone; None if none does.

    Only for float32: in lower precisions several tokens at once differ from one by one by more than the last digits,
    and guesses would change texts.
    """
    model = variants[variant]
    if model.precision is not Precision.FP32 or model.measured is None:
        return None
    plain = step_ms(model)
    paces = {name: pace for name, other in variants.items() if (pace := drafted_ms(model, other)) is not None}
    best = min(paces, key=paces.__getitem__, default=None)
    return best if best is not None and paces[best] <= WORTH * plain else None


def step_ms(model: VariantManifest) -> float:
    """A token of one text alone."""
    assert model.measured is not None
    return estimate_ms(model.measured.latency, 1, model.measured.typical_length)


def drafted_ms(model: VariantManifest, draft: VariantManifest) -> float | None:
    """Predicted ms for a token of `model` where `draft` guesses, with the number of guesses that suits them best.

    A guess is right with probability p (the share of the reference's greedy tokens that `draft` has as well), so that k
    guesses give (1 - p^(k+1)) / (1 - p) tokens (Leviathan et al., 2023, equation 1). `draft` also has to read every
    prompt, for all of its text's tokens together. None where it is not known.
    """
    measured, other = model.measured, draft.measured
    if model.id == draft.id or measured is None or other is None or measured.prompts is None:
        return None
    if other.prompts is None or other.quality.text is None or draft.task.width != model.task.width:
        return None
    right = min(other.quality.text.token_agreement, 0.99)
    guess, plain = step_ms(draft), step_ms(model)
    read = estimate_ms(other.prompts, 1, other.typical_length) / max(1.0, other.quality.text.tokens - 1)

    def pace(length: int) -> float:
        assert measured is not None
        assert measured.prompts is not None
        check = max(plain, estimate_ms(measured.prompts, 1, length + 1))
        return read + (length * guess + check) * (1 - right) / (1 - right ** (length + 1))

    return min(pace(length) for length in LENGTHS)
