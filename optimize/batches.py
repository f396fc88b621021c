"""Rows to padded torch batches for training: rows of like length together, in an order that a seed decides.

Only the order and the padding; what is computed on a batch is `optimize.distill`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fettle.manifest import TokenizerSpec
from fettle.rows import Row, Rows

# Batches are made of this many batches' rows at a time: enough to pad little, few enough that who shares a batch
# changes from one epoch to the next.
POOL_BATCHES: Final = 64


def shortened(row: Row, tokens: int) -> Row:
    """The row cut to `tokens` tokens; its last one stays, since an encoder expects its end mark."""
    if len(row) <= tokens:
        return row
    kept = np.append(np.arange(tokens - 1), len(row) - 1)
    types = None if row.type_ids is None else row.type_ids[kept]
    return Row(row.ids[kept], types, truncated=True)


def one_epoch(lengths: Sequence[int], rows: int, random: np.random.Generator) -> list[NDArray[np.int64]]:
    """Row numbers of every batch of one pass over the data, each row once, in the order in which to train.

    Rows are shuffled, sorted by length within a pool of `POOL_BATCHES` batches, cut into batches of at most `rows`
    rows, and the batches are shuffled again, so that lengths come in no order.
    """
    known = np.asarray(lengths)
    order = random.permutation(len(known))
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), POOL_BATCHES * rows):
        pool = order[start : start + POOL_BATCHES * rows]
        pool = pool[np.argsort(known[pool], kind="stable")]
        batches += [pool[first : first + rows] for first in range(0, len(pool), rows)]
    return [batches[index] for index in random.permutation(len(batches))]


def training_batches(lengths: Sequence[int], rows: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers of one batch after another without end: epoch after epoch, each in an order of its own.

    Nothing comes if there are no rows.
    """
    random = np.random.default_rng(seed)
    while lengths:
        yield from one_epoch(lengths, rows, random)


def by_length(lengths: Sequence[int], rows: int) -> list[NDArray[np.int64]]:
    """Row numbers of batches of like length, shortest first: for answers, where the order does not matter."""
    order = np.argsort(np.asarray(lengths, np.int64), kind="stable")
    return [order[first : first + rows] for first in range(0, len(order), rows)]


def tensors(rows: Sequence[Row], tokenizer: TokenizerSpec, device: torch.device) -> tuple[Tensor, ...]:
    """A model's inputs for one batch: `(input_ids, attention_mask)`, and `token_type_ids` if the model reads them.

    Each is int64 [rows, longest], right-padded.
    """
    ids, mask, types = Rows.of(rows).padded(tokenizer.pad_id)
    arrays = (ids, mask, types) if tokenizer.segments else (ids, mask)
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
