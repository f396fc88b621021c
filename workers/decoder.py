"""The contract under text generation: a runner of one decoder over slots of keys and values.

A runner holds tensors and no queue: which prompt is in which slot, what is fed next and which token is drawn is
`workers/generator.py`'s. Slots 0 to n - 1 decode together; a slot is a row of every layer's buffers.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fettle.manifest import VariantManifest

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]


class Runner(Protocol):
    """Not thread-safe: one call at a time.

    Attributes:
        slots, context: what is allocated now; a slot holds at most `context` tokens.
        bytes_per_token: of keys and values, for one token of one slot.
    """

    manifest: VariantManifest

    @property
    def slots(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def bytes_per_token(self) -> int: ...

    def warm_up(self) -> None:
        """Run typical shapes once, so that the first request does not pay for allocation and compilation."""

    def allocate(self, slots: int, context: int) -> None:
        """Make room for so many slots of so many tokens. What both the old and the new shape hold is kept."""

    def feed(self, slot: int, ids: Ids, start: int, logits: int) -> Floats:
        """Put `ids` int32 [n] at positions start to start + n - 1 of a slot, whose earlier positions are filled.

        Returns float32 [logits, vocabulary], the logits at the last `logits` of these positions (0 to n).

        Raises:
            EngineError: the runtime failed.
        """
        ...

    def decode(self, ids: Ids, lengths: Ids) -> Floats:
        """Put one token in each of the slots 0 to n - 1: `ids` int32 [n], slot i's at position `lengths[i]` int32 [n].

        Returns the logits there, float32 [n, vocabulary]. No row depends on the others.

        Raises:
            EngineError: the runtime failed.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Give the target slot the source's first `length` positions."""

    def close(self) -> None:
        """Free the model's memory."""
