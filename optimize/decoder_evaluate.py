"""How near a language model comes to its reference, in torch: for training and development.

What a family's manifest and certificates say is measured on the engine that serves; not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from fettle.extract import Extract
from optimize import losses
from optimize.batches import by_length
from optimize.decoder_examples import Example, ExampleBatch, Ids, example_batch
from optimize.decoder_objective import logits_at
from optimize.decoder_samples import generated
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
    for _, batch in _batches(teaching.examples, teaching.pad_id, device):
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


@torch.no_grad()
def perplexity(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, *, prompts: bool = False) -> float:
    """`exp` of the mean negative log-probability of the answers' tokens; of the prompts' as well with `prompts`."""
    total, tokens = 0.0, 0
    for _, batch in _batches(examples, pad_id, device_of(model)):
        chosen = batch.answers | batch.prompts if prompts else batch.answers
        logits = logits_at(model, batch.ids, chosen)
        total += float(functional.cross_entropy(logits, batch.targets[chosen], reduction="sum"))
        tokens += len(logits)
    return math.exp(total / tokens)


@torch.no_grad()
def answer_disagreements(
    model: PreTrainedModel,
    examples: Sequence[Example],
    extract: Extract,
    decode: Callable[[Ids], str],
    *,
    end_ids: Sequence[int],
    pad_id: int,
    max_tokens: int,
) -> NDArray[np.bool_]:
    """Which examples the model answers otherwise than they are answered, by the answer in the text: bool [examples].

    By greedy decoding. Examples all of whose tokens are the model's first choice need not be generated to know.

    Args:
        examples: with the reference's greedy answers of at most `max_tokens` tokens.
        decode: from an answer's ids to its text.
    """
    same = np.zeros(len(examples), np.bool_)
    for chosen, batch in _batches(examples, pad_id, device_of(model)):
        kept = _kept(logits_at(model, batch.ids, batch.answers), batch)
        same[chosen] = [bool(row.all()) for row in kept]
    other = [row for row, kept_all in enumerate(same) if not kept_all]
    prompts = [examples[row].ids[: examples[row].prompt] for row in other]
    answers = generated(model, prompts, end_ids=end_ids, pad_id=pad_id, max_tokens=max_tokens)
    changed = np.zeros(len(examples), np.bool_)
    pairs = zip(other, answers, strict=True)
    changed[other] = [extract(decode(ids)) != extract(decode(examples[row].answer)) for row, ids in pairs]
    return changed


def _batches(
    examples: Sequence[Example], pad_id: int, device: torch.device
) -> Iterator[tuple[NDArray[np.int64], ExampleBatch]]:
    for chosen in by_length([len(example) for example in examples], BATCH_ROWS):
        yield chosen, example_batch([examples[index] for index in chosen], pad_id, device)


def _kept(logits: Tensor, batch: ExampleBatch) -> list[NDArray[np.bool_]]:
    """For each row, which of its answer's tokens are the first choice: bool [tokens]."""
    first = (logits.argmax(dim=-1) == batch.targets[batch.answers]).cpu().numpy()
    return np.split(first, batch.answers.sum(dim=1).cumsum(dim=0).cpu().numpy()[:-1])
