"""Which weights of a language model to set to zero, for kernels that skip zeros: half of every four, on CUDA.

A zero in a dense matrix saves no time anywhere, so nothing here is a variant by itself: what comes out is meant for
`torch.sparse.to_sparse_semi_structured` on a device that has such kernels. Scores are Wanda's (Sun et al. 2024, "A
Simple and Effective Pruning Approach for Large Language Models") or the weights' own magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fettle.errors import PassError
from optimize.anatomy import Batch
from optimize.decoder_anatomy import dissect_decoder
from optimize.importance import hooks

Masks = dict[str, Tensor]


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """`|W_ij| * ||X_j||_2` of a weight [outputs, inputs] and its inputs' norms [inputs]; compared within a row."""
    return weight.abs().float() * norms.float()


def two_of_four(scores: Tensor) -> Tensor:
    """The two highest of every four neighbours in a row: bool [outputs, inputs]; ties go to the lower index.

    Raises:
        PassError: the rows do not divide into fours.
    """
    rows, columns = scores.shape
    if columns % 4:
        raise PassError(f"a weight with {columns} inputs does not divide into fours, so it cannot be 2:4 sparse")
    blocks = scores.view(rows, columns // 4, 4)
    return _highest(blocks, 2).view(rows, columns)


def highest_share(scores: Tensor, share: float) -> Tensor:
    """The highest `share` of every row: bool [outputs, inputs]; ties go to the lower index.

    Raises:
        PassError: the share is not between 0 and 1.
    """
    if not 0 < share <= 1:
        raise PassError(f"the share to keep is {share}; it lies above 0 and is at most 1")
    return _highest(scores, max(1, round(share * scores.shape[1])))


@torch.no_grad()
def input_norms(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """`||X_j||_2` over all real tokens, float64 [inputs], of every linear layer within the model's layers, by name.

    Args:
        batches: int64 [rows, length] ids and mask, right-padded.

    Raises:
        PassError: no text, or an architecture whose layers are not known or not linear layers of torch.
    """
    layers = _linear_layers(model)
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
    tokens = 0
    for ids, mask, *_ in batches:
        inside = mask.bool()

        def record(name: str, seen: Tensor, inside: Tensor = inside) -> None:
            sums[name] += seen[inside].double().square().sum(dim=0).cpu()

        handles = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name, record=record: record(name, inputs[0]))
            for name, layer in layers.items()
        ]
        with hooks(handles):
            model(ids)
        tokens += int(inside.sum())
    if not tokens:
        raise PassError("no text to measure the inputs on")
    return {name: total.sqrt() for name, total in sums.items()}


def wanda_masks(model: PreTrainedModel, norms: dict[str, Tensor], share: float | None = None) -> Masks:
    """What to keep of every linear layer: two of four, or `share` of every row where it is given."""
    layers = _linear_layers(model)
    scores = {name: wanda_scores(layer.weight.detach().cpu(), norms[name]) for name, layer in layers.items()}
    return {
        name: two_of_four(values) if share is None else highest_share(values, share) for name, values in scores.items()
    }


@torch.no_grad()
def apply_masks(model: PreTrainedModel, masks: Masks) -> None:
    """Set to zero what the masks do not keep, in place."""
    for name, mask in masks.items():
        weight = cast(Tensor, model.get_submodule(name).weight)
        weight.masked_fill_(~mask.to(weight.device), 0.0)


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """By name; not the embeddings and the head, which lie outside the layers."""
    anatomy = dissect_decoder(model)
    if anatomy.plan.transposed:
        raise PassError(f"{model.config.model_type} keeps its weights transposed, which has no 2:4 kernel")
    return {
        f"{anatomy.plan.layers}.{place}.{name}": module
        for place, block in enumerate(anatomy.blocks)
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear)
    }


def _highest(scores: Tensor, count: int) -> Tensor:
    """The `count` highest along the last axis."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
