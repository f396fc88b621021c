"""How near a language model comes to its reference, in torch: for training and development.

What a family's manifest and certificates say is measured on the engine that serves; not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from optimize import losses
from optimize.batches import by_length
from optimize.decoder_examples import Example, ExampleBatch, example_batch
from optimize.decoder_objective import logits_at
from optimize.objective import autocast, device_of

BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Teaching:
    """Examples whose answers are the teacher's greedy ones, and the teacher that gives the probabilities of them."""

    teacher: PreTrainedModel
    examples: Sequence[Example]
    pad_id: int
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class Agreement:
    """`tokens`: share of the answers' tokens that are the model's first choice too, each after the teacher's others.

    `texts`: share of the answers all of whose tokens are. Greedy decoding gives exactly these answers, and leaves the
    others at the first token that is not. `divergence`: KL from the teacher's to the model's next tokens, mean.
    """

    tokens: float
    texts: float
    divergence: float


@torch.no_grad()
def agreement(model: PreTrainedModel, teaching: Teaching) -> Agreement:
    """One forward pass of each model over all examples."""
    divergence, tokens = 0.0, 0
    kept: list[NDArray[np.bool_]] = []
    device = device_of(model)
    for batch in _batches(teaching.examples, teaching.pad_id, device):
        with autocast(device, teaching.bf16):
            said = logits_at(model, batch.ids, batch.answers)
            known = logits_at(teaching.teacher, batch.ids, batch.answers)
        count = len(said)
        divergence += float(losses.soft_single_label(said, known, 1.0)) * count
        tokens += count
        kept += _kept(said, batch)
    return Agreement(
        tokens=float(np.concatenate(kept).mean()),
        texts=float(np.mean([bool(row.all()) for row in kept])),
        divergence=divergence / tokens,
    )


def _batches(examples: Sequence[Example], pad_id: int, device: torch.device) -> Iterator[ExampleBatch]:
    for chosen in by_length([len(example) for example in examples], BATCH_ROWS):
        yield example_batch([examples[index] for index in chosen], pad_id, device)


def _kept(logits: Tensor, batch: ExampleBatch) -> list[NDArray[np.bool_]]:
    """For each row, which of its answer's tokens are the first choice: bool [tokens]."""
    first = (logits.argmax(dim=-1) == batch.targets[batch.answers]).cpu().numpy()
    return np.split(first, batch.answers.sum(dim=1).cumsum(dim=0).cpu().numpy()[:-1])
