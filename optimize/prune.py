"""Removes layers, attention heads and feed-forward neurons from an encoder, in place.

The weights are really gone: every matrix becomes smaller, layers may end up with different widths, and what is left
computes what the whole computed with the removed parts set to zero. What to remove is the caller's choice, from
`optimize.importance`; the rules for choosing are here too. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from fettle.errors import PassError
from optimize.anatomy import Anatomy, Layer, dissect, part, put, set_layers
from workers.torch_encoder import Scorer

# Matrix kernels work on blocks of 16 columns (16 floats in an AVX-512 register, 16 int8 columns of a VNNI tile, 8 or
# 16 on tensor cores): a width between two multiples costs as much as the next one.
NEURON_BLOCK = 16
HEAD_COUNTS = ("num_attention_heads", "n_heads")


# Layers.


def keep_layers(scorer: Scorer, keep: list[int]) -> None:
    """Drop all layers but these, given in ascending order from 0.

    Raises:
        PassError: no layer is kept, an index is wrong, or DeBERTa's first layer goes while a convolution follows it.
    """
    anatomy = dissect(scorer)
    _check(keep, len(anatomy.layers), "layers")
    if keep[0] != 0 and part(anatomy.base, "encoder.conv") is not None:
        raise PassError("DeBERTa's convolution belongs to its first layer; keep layer 0")
    set_layers(anatomy, [anatomy.layers[index].module for index in keep])


def least_influential(influence: list[float], count: int) -> list[int]:
    """The `count` layers to drop first, in ascending order; never layer 0.

    The first layer turns embeddings into states in context, which the others take for granted, and its cosine compares
    two different spaces; in ModernBERT and DeBERTa it is also built unlike the others.

    Raises:
        PassError: fewer layers than that can go.
    """
    if not 0 <= count < len(influence):
        raise PassError(f"{count} of {len(influence)} layers cannot be dropped; at least the first one stays")
    ranked = sorted(range(1, len(influence)), key=lambda index: (influence[index], index))
    return sorted(ranked[:count])


# Heads and neurons.


def prune_heads(scorer: Scorer, keep: list[list[int]]) -> None:
    """Keep these heads of each layer, ascending. Layers that share their weights need the same list.

    Raises:
        PassError: an empty or wrong list, or different lists for one set of weights.
    """
    anatomy = dissect(scorer)
    for layer, heads in _each(anatomy, keep, [layer.heads for layer in anatomy.layers], "heads"):
        before = layer.heads
        if len(heads) == before:
            continue
        for projection in layer.projections:
            take_rows(projection, _units(heads, projection.out_features, before, layer.head_size))
        take_columns(layer.output, _units(heads, layer.output.in_features, before, layer.head_size))
        attention = cast(Any, layer.attention)
        if isinstance(attention, MPNetSelfAttention):
            attention = SelectedHeads(attention, heads)
            put(layer.module, anatomy.plan.attention, attention)
        for name in HEAD_COUNTS:
            if hasattr(attention, name):
                setattr(attention, name, len(heads))
        if hasattr(attention, "all_head_size"):
            attention.all_head_size = len(heads) * layer.head_size


def prune_neurons(scorer: Scorer, keep: list[list[int]]) -> None:
    """Keep these feed-forward neurons of each layer, ascending. Layers that share their weights need the same list.

    A gated neuron is removed with its gate.

    Raises:
        PassError: an empty or wrong list, or different lists for one set of weights.
    """
    anatomy = dissect(scorer)
    for layer, neurons in _each(anatomy, keep, [layer.neurons for layer in anatomy.layers], "neurons"):
        take_rows(layer.up, _units(neurons, layer.up.out_features, layer.neurons, 1))
        take_columns(layer.down, torch.tensor(neurons))


def choose_heads(importance: list[Tensor], keep_share: float) -> list[list[int]]:
    """The most important heads over all layers together, at least one a layer.

    Args:
        importance: one float [heads] for each layer.
        keep_share: of all heads, above 0 and at most 1; ties and the minimum may keep more.

    The scores of all layers are compared as they are: they estimate changes of one loss. Dividing each layer's by
    their norm, as Michel et al. (2019) do, changed the answers of a six-layer classifier more.
    """
    threshold = _threshold(importance, keep_share)
    return [_largest(values, max(1, int((values >= threshold).sum()))) for values in importance]


def choose_neurons(importance: list[Tensor], keep_share: float, multiple: int = NEURON_BLOCK) -> list[list[int]]:
    """The most important neurons over all layers together, in each layer a multiple of `multiple`, at least one such.

    Args:
        importance: one float [neurons] for each layer.
        keep_share: of all neurons, above 0 and at most 1; met up to the rounding in each layer.
        multiple: widths between two multiples of the kernels' block cost as much as the next one.

    The scores of a layer are divided by their Euclidean norm first (Molchanov et al. 2017): neurons are many and go
    together, which a first-order estimate for each alone does not see, and without the norm the last layer of a
    classifier, where one position counts, loses nearly all.
    """
    scores = [values / values.norm().clamp(min=torch.finfo(torch.float32).tiny) for values in importance]
    threshold = _threshold(scores, keep_share)
    chosen = []
    for values in scores:
        rounded = multiple * max(1, round(int((values >= threshold).sum()) / multiple))
        chosen.append(_largest(values, min(rounded, len(values))))
    return chosen


class SelectedHeads(MPNetSelfAttention):  # type: ignore[misc]
    """MPNet's attention with some of its heads: takes their share of the position bias that all layers have in common.

    The bias is [batch, heads of the encoder, query, key]; `bias_heads` is int64 [heads of this layer].
    """

    def __init__(self, attention: MPNetSelfAttention, heads: list[int]) -> None:
        nn.Module.__init__(self)
        for name in ("num_attention_heads", "attention_head_size", "all_head_size", "q", "k", "v", "o", "dropout"):
            setattr(self, name, getattr(attention, name))
        before = getattr(attention, "bias_heads", torch.arange(attention.num_attention_heads))
        self.register_buffer("bias_heads", before[torch.tensor(heads, device=before.device)])
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        bias = None if position_bias is None else position_bias.index_select(1, cast(Tensor, self.bias_heads))
        outputs: tuple[Tensor, ...] = super().forward(
            hidden_states, attention_mask, bias, output_attentions=output_attentions, **kwargs
        )
        return outputs


# Slicing.


def take_rows(module: nn.Linear, index: Tensor) -> None:
    """Keep these outputs of a linear layer."""
    module.weight = take(module.weight, 0, index)
    if module.bias is not None:
        module.bias = take(module.bias, 0, index)
    module.out_features = len(index)


def take_columns(module: nn.Linear, index: Tensor) -> None:
    """Keep these inputs of a linear layer."""
    module.weight = take(module.weight, 1, index)
    module.in_features = len(index)


def take(weight: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    """These positions of a weight along one axis, as a weight of its own."""
    kept = weight.detach().index_select(axis, index.to(weight.device)).contiguous()
    return nn.Parameter(kept, requires_grad=weight.requires_grad)


def _units(keep: Iterable[int], total: int, units: int, size: int) -> Tensor:
    """Positions of these units in `total`: any number of blocks (query, key, value), each of `units` times `size`."""
    blocks = total // (units * size)
    positions = torch.arange(total).view(blocks, units, size)
    return positions[:, list(keep)].reshape(-1)


# Checks and choices.


def _each(anatomy: Anatomy, keep: list[list[int]], totals: list[int], what: str) -> Iterator[tuple[Layer, list[int]]]:
    """Every set of weights once, with the list for it; all lists are checked before the first is used."""
    if len(keep) != len(anatomy.layers):
        raise PassError(f"{len(keep)} lists of {what} for {len(anatomy.layers)} layers; give one for each")
    pairs: dict[int, tuple[Layer, list[int]]] = {}
    for layer, wanted, total in zip(anatomy.layers, keep, totals, strict=True):
        _check(wanted, total, what)
        _, before = pairs.setdefault(id(layer.output), (layer, wanted))
        if before != wanted:
            raise PassError(f"layers that share their weights keep the same {what}; give them the same list")
    yield from pairs.values()


def _check(keep: list[int], total: int, what: str) -> None:
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= total:
        raise PassError(f"{what} to keep are {_short(keep)}; give at least one of 0 to {total - 1}, ascending")


def _short(keep: list[int]) -> str:
    return str(keep) if len(keep) <= 12 else f"{keep[:6]}... ({len(keep)} of them)"


def _threshold(scores: list[Tensor], keep_share: float) -> Tensor:
    """The smallest score that is kept. A threshold, not a rank, so that layers with the same scores keep the same."""
    if not 0 < keep_share <= 1:
        raise PassError(f"the share to keep is {keep_share}; it lies above 0 and is at most 1")
    flat = torch.cat(scores)
    if not bool(torch.isfinite(flat).all()):
        raise PassError("an importance is not finite; the loss overflowed on this data")
    return flat.sort(descending=True).values[max(1, round(keep_share * len(flat))) - 1]


def _largest(values: Tensor, count: int) -> list[int]:
    # Stable, so that ties go to the lower index on every machine.
    order = torch.sort(values, descending=True, stable=True).indices
    return sorted(order[:count].tolist())
