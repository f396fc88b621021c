"""Prompts with answers as training and tuning examples for a language model, and their padded batches.

Where the answers come from (the data, or the teacher by `optimize.decoder_samples`) does not matter here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimize.anatomy import Batch
from optimize.batches import by_length

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """`ids` int32 [tokens]: a prompt of `prompt` tokens (at least one), then its answer and the token that ends it."""

    ids: Ids
    prompt: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer(self) -> Ids:
        return self.ids[self.prompt :]


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """Right-padded int64 `ids` [rows, longest], and where a next token is to be learnt: bool of the same shape.

    `answers` marks the positions that predict a token of the answer, `prompts` those that predict one of the prompt.
    No mask is needed: no token of a causal model sees the padding after it.
    """

    ids: Tensor
    answers: Tensor
    prompts: Tensor

    @property
    def targets(self) -> Tensor:
        """The next token at each position, int64 [rows, longest]; of no meaning at the last one."""
        return self.ids.roll(-1, dims=1)


def examples_of(prompts: Sequence[Ids], answers: Sequence[Ids], end_id: int | None = None) -> list[Example]:
    """Pairs of prompts and answers; `end_id` is put behind each answer, where it is given."""
    end = np.array([] if end_id is None else [end_id], np.int32)
    pairs = zip(prompts, answers, strict=True)
    return [Example(np.concatenate([prompt, answer, end]), len(prompt)) for prompt, answer in pairs]


def example_batch(examples: Sequence[Example], pad_id: int, device: torch.device) -> ExampleBatch:
    lengths = np.array([len(example) for example in examples])
    starts = np.array([example.prompt for example in examples])
    places = np.arange(lengths.max())
    ids = np.full((len(examples), len(places)), pad_id, np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = example.ids
    predicts = places < lengths[:, None] - 1
    answers = predicts & (places >= starts[:, None] - 1)
    arrays = (ids, answers, predicts & ~answers)
    return ExampleBatch(*(torch.from_numpy(array).to(device) for array in arrays))


def prompt_batches(examples: Sequence[Example], rows: int, pad_id: int, *, answers: bool = True) -> Iterator[Batch]:
    """Ids and mask in batches of like length, for what is measured on texts; the prompts alone without `answers`."""
    texts = [example.ids if answers else example.ids[: example.prompt] for example in examples]
    for chosen in by_length([len(text) for text in texts], rows):
        longest = max(len(texts[index]) for index in chosen)
        ids = torch.full((len(chosen), longest), pad_id, dtype=torch.int64)
        for row, index in enumerate(chosen):
            ids[row, : len(texts[index])] = torch.from_numpy(texts[index].astype(np.int64))
        lengths = torch.tensor([[len(texts[index])] for index in chosen])
        yield ids, (torch.arange(longest) < lengths).long()
