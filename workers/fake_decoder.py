"""A text generator without a model, for tests of everything around one.

Its logits are a hash of a slot's whole history of tokens and their positions, so that any mistake of scheduling,
copying or moving slots changes the output. It takes as long as it is told to and fails where it is told to.
"""

from __future__ import annotations

import os
import time

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fettle.errors import EngineError, FamilyError
from fettle.manifest import Strict, VariantManifest
from workers.decoder import Floats, Ids
from workers.fake import CRASH_STATUS, FAKE_PASS

# Of a slot's position that nothing was put at.
NOTHING = -1
# Logits lie between minus and plus this, so that some tokens are likely and none is certain.
SPREAD = 6.0


class FakeDecoderParameters(Strict):
    """The parameters of the pass named "fake" in the manifest's recipe."""

    ms_per_call: float = Field(default=0.0, ge=0)
    ms_per_token: float = Field(default=0.0, ge=0, description="for each new token of a call, of all rows")
    fail_on_token: int | None = Field(default=None, description="a call with this token id raises EngineError")
    exit_on_token: int | None = Field(default=None, description="a call with this token id ends the process")
    salt: int = Field(default=0, ge=0, description="variants with another salt write other texts")


class FakeRunner:
    def __init__(self, manifest: VariantManifest) -> None:
        """Raises FamilyError for a manifest that describes no text generator."""
        if manifest.decoder is None:
            raise FamilyError(f"variant {manifest.id!r} has no `decoder` in its manifest, so it generates no text")
        given = next((step.parameters for step in manifest.recipe if step.name == FAKE_PASS), {})
        self.manifest = manifest
        self.parameters = FakeDecoderParameters.model_validate(given)
        self.slots = 0
        self.context = 0
        self.bytes_per_token = 4 * manifest.decoder.kv_floats_per_token
        self._longest = manifest.decoder.context
        self._tokens = np.empty((0, 0), np.int32)

    def warm_up(self) -> None:
        """Nothing to warm."""

    def allocate(self, slots: int, context: int) -> None:
        if context > self._longest:
            raise EngineError(f"a slot of {context} tokens was asked for; this model's context is {self._longest}")
        tokens = np.full((slots, context), NOTHING, np.int32)
        kept = np.s_[: min(slots, self.slots), : min(context, self.context)]
        tokens[kept] = self._tokens[kept]
        self._tokens, self.slots, self.context = tokens, slots, context

    def feed(self, slot: int, ids: Ids, start: int, logits: int) -> Floats:
        end = start + len(ids)
        self._begin(slot + 1, end, ids)
        self._tokens[slot, start:end] = ids
        vocabulary = self.manifest.task.width
        rows = [self._logits(self._tokens[slot, : end - back]) for back in reversed(range(logits))]
        return np.stack(rows) if rows else np.empty((0, vocabulary), np.float32)

    def decode(self, ids: Ids, lengths: Ids) -> Floats:
        self._begin(len(ids), int(lengths.max(initial=0)) + 1, ids)
        self._tokens[np.arange(len(ids)), lengths] = ids
        return np.stack([self._logits(self._tokens[slot, : length + 1]) for slot, length in enumerate(lengths)])

    def copy(self, source: int, target: int, length: int) -> None:
        self._check(max(source, target) + 1, length)
        self._tokens[target, :length] = self._tokens[source, :length]

    def close(self) -> None:
        """Nothing to free."""

    def _logits(self, history: Ids) -> Floats:
        return expected(history, self.manifest.task.width, self.parameters.salt)

    def _begin(self, slots: int, tokens: int, ids: Ids) -> None:
        self._check(slots, tokens)
        if self.parameters.exit_on_token in ids:
            os._exit(CRASH_STATUS)
        if self.parameters.fail_on_token in ids:
            raise EngineError(f"the fake engine was told to fail on token {self.parameters.fail_on_token}")
        time.sleep((self.parameters.ms_per_call + self.parameters.ms_per_token * len(ids)) / 1000)

    def _check(self, slots: int, tokens: int) -> None:
        if slots > self.slots or tokens > self.context:
            raise EngineError(
                f"{slots} slots of {tokens} tokens are needed, and {self.slots} of {self.context} are allocated"
            )


def expected(history: Ids, vocabulary: int, salt: int = 0) -> Floats:
    """The fake runner's logits after `history` int32 [tokens]: float32 [vocabulary], evenly spread."""
    places = _mixed(np.arange(1, len(history) + 1, dtype=np.uint64))
    state = (_mixed(history.astype(np.uint64) + places)).sum(dtype=np.uint64) + np.uint64(salt)
    bits = _mixed(np.arange(vocabulary, dtype=np.uint64) + _mixed(np.array([state], np.uint64)))
    return ((bits >> np.uint64(11)) * (2 * SPREAD / 2**53) - SPREAD).astype(np.float32)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
