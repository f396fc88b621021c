"""The arrays that pass between tokenizer, batcher, worker and back: rows of token ids, and their outputs.

Rows are flat (no padding), so that a batch of unequal texts costs on the wire what its tokens cost, and padding
is the engine's own business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Padded tokens in one call of an engine on CPU, per thread: benchmarks/LOG.md, "micro-batches".
CALL_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenized text: `ids` int32 [n]; `type_ids` int8 [n] (segment of each token), None if all are 0."""

    ids: NDArray[np.int32]
    type_ids: NDArray[np.int8] | None = None
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch: `ids` int32 [sum of lengths], `lengths` int32 [rows], `type_ids` int8 [sum of lengths] or None."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    type_ids: NDArray[np.int8] | None = None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        """Join rows into one flat batch; segments are kept if any row has them."""
        typed = any(row.type_ids is not None for row in rows)
        return cls(
            ids=np.concatenate([row.ids for row in rows]),
            lengths=np.fromiter((len(row) for row in rows), np.int32, len(rows)),
            type_ids=np.concatenate([_types(row) for row in rows]) if typed else None,
        )

    def __len__(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def padded(self, pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Right-padded `(input_ids, attention_mask, token_type_ids)`, each int64 [rows, longest]."""
        inside = np.arange(self.longest) < self.lengths[:, None]
        ids = np.full(inside.shape, pad_id, np.int64)
        ids[inside] = self.ids
        types = np.zeros(inside.shape, np.int64)
        if self.type_ids is not None:
            types[inside] = self.type_ids
        return ids, inside.astype(np.int64), types


@dataclass(frozen=True, slots=True)
class Exits:
    """Where each row may leave a staged variant early; rows of several operating points share a batch.

    `thresholds` float32 [rows, stages - 1] on the score of each stage but the last, above 1 for never;
    `temperatures`, of the same shape, that the stages' logits are divided by before they are scored.
    """

    thresholds: NDArray[np.float32]
    temperatures: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Outputs:
    """What an engine returns: `values` float32 [rows, width] (logits, or vectors), and its own time in ms.

    `stages` int8 [rows]: the stage that answered each row, from 0; None where the variant has only one.
    `scores` float32 [rows, stages - 1]: what the early gates saw, NaN where they did not look; None without exits.
    """

    values: NDArray[np.float32]
    infer_ms: float
    stages: NDArray[np.int8] | None = None
    scores: NDArray[np.float32] | None = None


def joined(parts: Sequence[Rows]) -> Rows:
    """Several batches as one."""
    typed = any(part.type_ids is not None for part in parts)
    zeros = [np.zeros(part.tokens, np.int8) if part.type_ids is None else part.type_ids for part in parts]
    return Rows(
        ids=np.concatenate([part.ids for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        type_ids=np.concatenate(zeros) if typed else None,
    )


def engine_calls(
    lengths: Sequence[int], tokens: int | None, *, row_by_row: bool = False, packed: bool = False
) -> list[list[int]]:
    """A batch as the calls that an engine makes of it, by row numbers: sorted by length, `tokens` of them in each.

    Padded ones, unless the engine's graph is `packed`. `tokens` None: all in one call.
    """
    if row_by_row:
        return [[row] for row in range(len(lengths))]
    if tokens is None or len(lengths) == 1 or max(lengths) * len(lengths) <= tokens // 2:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return list(in_batches(order, lengths, len(lengths), tokens, packed=packed))


def in_batches(
    order: Sequence[int], lengths: Sequence[int], rows: int, tokens: int, *, packed: bool = False
) -> Iterable[list[int]]:
    """Cut `order` (row numbers) into consecutive batches of at most `rows` rows and `tokens` tokens, padded or not.

    A row longer than `tokens` goes alone.
    """
    batch: list[int] = []
    longest = total = 0
    for index in order:
        longest, total = max(longest, lengths[index]), total + lengths[index]
        size = total if packed else longest * (len(batch) + 1)
        if batch and (len(batch) == rows or size > tokens):
            yield batch
            batch, longest, total = [], lengths[index], lengths[index]
        batch.append(index)
    if batch:
        yield batch


def _types(row: Row) -> NDArray[np.int8]:
    return np.zeros(len(row), np.int8) if row.type_ids is None else row.type_ids
