"""How far a student is from its teacher: pure, differentiable functions over tensors, each a scalar.

All compute in float32 and are 0 for a student that equals its teacher, except `soft_multi_label`, whose least value
is the teacher's own entropy. None knows a model; which of them count, and how much, is `optimize.distill`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

# Small enough that the nearest neighbours decide, as in contrastive training of sentence encoders.
NEIGHBOUR_TEMPERATURE: Final = 0.05
MOST_RELATION_HEADS: Final = 12


def soft_single_label(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, mean over rows; logits [rows, labels].

    Hinton, Vinyals and Dean (2015), "Distilling the Knowledge in a Neural Network"; the factor keeps the size of the
    gradient the same at every temperature.
    """
    known = functional.log_softmax(teacher.float() / temperature, dim=-1)
    said = functional.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * functional.kl_div(said, known, reduction="batchmean", log_target=True)


def reverse_single_label(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(student / T) || softmax(teacher / T))`, mean over rows; logits [rows, labels].

    It makes a student that cannot be like its teacher everywhere leave out what it cannot say, instead of spreading
    over all of it: Gu et al. (2024), "MiniLLM", there on the student's own samples.
    """
    known = functional.log_softmax(teacher.float() / temperature, dim=-1)
    said = functional.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * functional.kl_div(known, said, reduction="batchmean", log_target=True)


def soft_multi_label(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2` times the binary cross-entropy of the labels' sigmoids at temperature T, mean over rows and labels.

    Logits [rows, labels]; each label is a question of its own.
    """
    known = torch.sigmoid(teacher.float() / temperature)
    return temperature**2 * functional.binary_cross_entropy_with_logits(student.float() / temperature, known)


def soft_regression(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """Mean squared difference of numbers [rows, width], in units of `scale` (the spread of the teacher's answers)."""
    return functional.mse_loss(student.float() / scale, teacher.float() / scale)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`1 - cosine` of vectors [rows, width], mean over rows; in [0, 2]."""
    return 1.0 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def neighbours(student: Tensor, teacher: Tensor, temperature: float = NEIGHBOUR_TEMPERATURE) -> Tensor:
    """How far the student's idea of who is near to whom in the batch is from the teacher's; vectors [rows, width].

    For each row, `KL(teacher || student)` of the softmax over its cosine similarities with the other rows, divided by
    the temperature; mean over rows. The widths may differ. A row alone has no neighbours: 0.

    Relational distillation on in-batch similarities as in Fang et al. (2021), "SEED", without its queue.
    """
    rows = student.shape[0]
    if rows < 2:
        # Still a part of the graph, so that a batch of one row can be trained on.
        return student.float().sum() * 0.0
    known, said = (_log_nearness(vectors, temperature) for vectors in (teacher, student))
    return functional.kl_div(said, known, reduction="batchmean", log_target=True)


def _log_nearness(vectors: Tensor, temperature: float) -> Tensor:
    """Log of the softmax over the other rows' similarities: [rows, rows - 1]."""
    unit = functional.normalize(vectors.float(), dim=-1)
    similarities = unit @ unit.T
    rows = similarities.shape[0]
    others = ~torch.eye(rows, dtype=torch.bool, device=vectors.device)
    return functional.log_softmax(similarities[others].view(rows, rows - 1) / temperature, dim=-1)


def hidden_states(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared distance of unit-length states [rows, length, width], mean over the tokens inside `mask` [rows, length].

    Both of one width. Patient knowledge distillation (Sun et al. 2019), on all tokens instead of the first alone.
    """
    gap = functional.normalize(student.float(), dim=-1) - functional.normalize(teacher.float(), dim=-1)
    return _mean_inside(gap.square().sum(dim=-1), mask)


def token_relations(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """KL from the teacher's to the student's relations among a text's tokens; states [rows, length, width].

    An approximation of MiniLMv2 (Wang et al. 2021): there the relations are softmaxes of scaled dot products among
    queries, among keys and among values of one layer; here they are those among the layer's hidden states, split
    into `heads` relation heads, since queries, keys and values are laid out differently in every architecture. Each
    token's state is normalised to mean 0 and variance 1 first, so that states of any size are comparable. The widths
    may differ; both must be multiples of `heads`. Padding neither attends nor is attended to. Mean over heads and
    over the tokens inside `mask` [rows, length].
    """
    known, said = (_log_relations(states, mask, heads) for states in (teacher, student))
    inside = mask[:, None, None, :].bool()
    # What padding got is no difference between the two.
    gaps = torch.where(inside, known.exp() * (known - said), torch.zeros((), device=known.device))
    return _mean_inside(gaps.sum(dim=-1).mean(dim=1), mask)


def _log_relations(states: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Log of the softmax over the tokens of the text: [rows, heads, length, length].

    Padding gets the lowest float, not -inf: its share is exactly 0 all the same, and gradients stay finite.
    """
    rows, length, width = states.shape
    flat = functional.layer_norm(states.float(), (width,))
    split = flat.view(rows, length, heads, width // heads).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    outside = mask[:, None, None, :] == 0
    return functional.log_softmax(scores.masked_fill(outside, torch.finfo(torch.float32).min), dim=-1)


def _mean_inside(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of [rows, length] over the tokens inside the mask."""
    inside = mask.to(values.dtype)
    return (values * inside).sum() / inside.sum().clamp(min=1.0)


def relation_heads(student_width: int, teacher_width: int) -> int:
    """The largest number of relation heads, at most `MOST_RELATION_HEADS`, that divides both widths."""
    common = math.gcd(student_width, teacher_width)
    return max(heads for heads in range(1, MOST_RELATION_HEADS + 1) if common % heads == 0)


def uniform_layers(student: int, teacher: int) -> list[int]:
    """Which teacher layer (from 1) each of the student's layers imitates: evenly spread, the last the last one."""
    return [max(1, round(layer * teacher / student)) for layer in range(1, student + 1)]


def weighted_sum(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum(weight x loss)`; parts of weight 0 may be left out by the caller, since they cost time all the same."""
    return torch.stack([weight * loss for loss, weight in zip(losses, weights, strict=True)]).sum()
