"""Removes layers, feed-forward neurons and groups of heads from a language model, and merges heads of keys and values.

Each gives another model that an ordinary configuration describes: the same number of neurons and heads in every layer.
What is left computes what the whole computed with the removed parts set to zero; merged heads are a starting point for
distillation. What to remove is the caller's choice, from `optimize.decoder_importance`; the rules for choosing are here
too. Nothing is trained.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fettle.errors import PassError
from optimize.decoder_anatomy import Change, DecoderAnatomy, dissect_decoder, rebuilt

# Weights of few bits are kept in blocks of this many inputs; a width between two multiples costs as much as the next.
NEURON_BLOCK: Final = 32


# Depth.


def keep_decoder_layers(model: PreTrainedModel, keep: list[int]) -> PreTrainedModel:
    """The model with these layers alone, ascending from 0.

    Raises:
        PassError: no layer is kept, an index is wrong, or a layer's place in the model changes what it computes.
    """
    anatomy = dissect_decoder(model)
    config = cast(Any, model.config)
    _check(keep, len(anatomy.blocks), "layers")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise PassError("attention is scaled by the number of the layer, so none can be dropped; prune neurons instead")
    settings: dict[str, object] = {anatomy.plan.depth_key: len(keep)}
    for name in anatomy.plan.each_layer:
        values = getattr(config, name, None)
        if values is not None:
            settings[name] = [values[layer] for layer in keep]
    return rebuilt(anatomy, settings, {}, keep)


# Width.


def keep_neurons(model: PreTrainedModel, keep: list[list[int]]) -> PreTrainedModel:
    """The model with these feed-forward neurons of each layer, ascending, equally many in each. Gates go along.

    Raises:
        PassError: a wrong list, or lists of different lengths.
    """
    anatomy = dissect_decoder(model)
    count = _check_uniform(keep, len(anatomy.blocks), anatomy.neurons, "neurons")
    changes: dict[str, Change] = {}
    for layer, neurons in enumerate(keep):
        rows = _units(neurons, anatomy.neurons, 1, blocks=anatomy.plan.gates)
        changes |= {anatomy.name(layer, path): _rows(anatomy, rows) for path in anatomy.plan.up}
        changes[anatomy.name(layer, anatomy.plan.down)] = _columns(anatomy, torch.tensor(neurons))
    return rebuilt(anatomy, {anatomy.plan.neurons_key: count}, changes)


def keep_kv_groups(model: PreTrainedModel, keep: list[list[int]]) -> PreTrainedModel:
    """The model with these heads of keys and values of each layer, and the query heads that read them.

    Ascending, equally many in each layer. The size of a head stays.

    Raises:
        PassError: a wrong list, lists of different lengths, or a number of heads that the architecture cannot have.
    """
    anatomy = dissect_decoder(model)
    count = _check_uniform(keep, len(anatomy.blocks), anatomy.groups, "groups of heads")
    _check_grouped(anatomy)
    changes: dict[str, Change] = {}
    for layer, groups in enumerate(keep):
        queries = _units(groups, anatomy.groups, anatomy.queries * anatomy.head_size)
        keys = _units(groups, anatomy.groups, anatomy.head_size)
        changes |= _on_projections(anatomy, layer, _rows(anatomy, queries), _rows(anatomy, keys))
        changes[anatomy.name(layer, anatomy.plan.output)] = _columns(anatomy, queries)
    return rebuilt(anatomy, _heads(anatomy, count * anatomy.queries, count), changes)


def pool_kv_heads(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model with `count` heads of keys and values, each the mean of neighbours; all query heads stay.

    From multi-head to grouped-query attention as in Ainslie et al. (2023), "GQA". Exact where the merged heads are
    equal; otherwise distil afterwards.

    Raises:
        PassError: `count` does not divide the number there is.
    """
    anatomy = dissect_decoder(model)
    if not 1 <= count < anatomy.groups or anatomy.groups % count:
        raise PassError(
            f"{anatomy.groups} heads of keys and values cannot be merged to {count}; give a smaller number that "
            "divides them"
        )
    _check_grouped(anatomy)

    def pooled(weight: Tensor) -> Tensor:
        merged = weight.view(count, anatomy.groups // count, anatomy.head_size, *weight.shape[1:]).float().mean(dim=1)
        return merged.to(weight.dtype).view(count * anatomy.head_size, *weight.shape[1:])

    changes: dict[str, Change] = {}
    for layer in range(len(anatomy.blocks)):
        changes |= _on_projections(anatomy, layer, lambda weight: weight, pooled)
    return rebuilt(anatomy, _heads(anatomy, anatomy.heads, count), changes)


# Choices.


def choose_evenly(importance: list[Tensor], count: int) -> list[list[int]]:
    """The `count` most important units of each layer, ascending; of equals those with the lower index.

    Raises:
        PassError: there are not so many, or an importance is not finite.
    """
    if not all(bool(torch.isfinite(values).all()) for values in importance):
        raise PassError("an importance is not finite; the model overflows on this data")
    if not all(1 <= count <= len(values) for values in importance):
        raise PassError(f"{count} cannot be kept of {min(map(len, importance))}; give at least 1 and at most all")
    orders = [torch.sort(values, descending=True, stable=True).indices for values in importance]
    return [sorted(order[:count].tolist()) for order in orders]


def neuron_count(total: int, share: float) -> int:
    """`share` of the neurons, to the nearest multiple of `NEURON_BLOCK`, at least one such and at most all."""
    return min(total, NEURON_BLOCK * max(1, round(share * total / NEURON_BLOCK)))


# Slicing.


def _rows(anatomy: DecoderAnatomy, index: Tensor) -> Change:
    """Keeps these outputs, in the weight and in the bias."""
    return lambda weight: weight.index_select(anatomy.rows(weight), index.to(weight.device))


def _columns(anatomy: DecoderAnatomy, index: Tensor) -> Change:
    """Keeps these inputs; the bias has none."""
    return lambda weight: (
        weight if weight.ndim == 1 else weight.index_select(1 - anatomy.rows(weight), index.to(weight.device))
    )


def _on_projections(anatomy: DecoderAnatomy, layer: int, queries: Change, keys: Change) -> dict[str, Change]:
    """The changes of a layer's query, key and value rows, packed into one matrix or not."""
    names = [anatomy.name(layer, path) for path in anatomy.plan.qkv]
    if len(names) == 3:
        return dict(zip(names, (queries, keys, keys), strict=True))
    sizes = [anatomy.heads * anatomy.head_size, *[anatomy.groups * anatomy.head_size] * 2]

    def packed(weight: Tensor) -> Tensor:
        query, key, value = torch.split(weight, sizes)
        return torch.cat([queries(query), keys(key), keys(value)])

    return {names[0]: packed}


def _units(keep: list[int], total: int, size: int, blocks: int = 1) -> Tensor:
    """Positions of these units of `size` rows each, in every one of `blocks` blocks of `total` units."""
    positions = torch.arange(blocks * total * size).view(blocks, total, size)
    return positions[:, keep].reshape(-1)


def _heads(anatomy: DecoderAnatomy, heads: int, groups: int) -> dict[str, object]:
    """The size of a head has to be said as soon as it is not what the hidden width and the heads suggest."""
    return {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": anatomy.head_size}


# Checks.


def _check_grouped(anatomy: DecoderAnatomy) -> None:
    if not anatomy.plan.grouped:
        kind = anatomy.model.config.model_type
        raise PassError(
            f"a {kind} configuration knows only heads that fill the hidden width, each with keys and values of its "
            "own, so none can go; drop layers or prune neurons instead"
        )


def _check_uniform(keep: list[list[int]], layers: int, total: int, what: str) -> int:
    if len(keep) != layers:
        raise PassError(f"{len(keep)} lists of {what} for {layers} layers; give one for each")
    for wanted in keep:
        _check(wanted, total, what)
    counts = {len(wanted) for wanted in keep}
    if len(counts) > 1:
        raise PassError(f"layers keep {min(counts)} to {max(counts)} {what}; an ordinary checkpoint has equally many")
    return counts.pop()


def _check(keep: list[int], total: int, what: str) -> None:
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= total:
        shown = str(keep) if len(keep) <= 12 else f"{keep[:6]}... ({len(keep)} of them)"
        raise PassError(f"{what} to keep are {shown}; give at least one of 0 to {total - 1}, ascending")
