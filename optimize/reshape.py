"""Another architecture from the same weights: shared layers, factorised embeddings, fewer layers, a narrower model.

Each is a starting point for distillation: the result answers worse than the original until it is trained, except for
the factorised embedding at full rank. Sharing saves memory and no time; the other three save both.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from fettle.errors import PassError
from fettle.manifest import TaskKind
from optimize.anatomy import Anatomy, Layer, dissect, linear, part, put, set_layers
from optimize.prune import prune_heads, take, take_columns, take_rows
from workers.torch_encoder import Scorer, pooled

Holder = TypeVar("Holder", nn.Embedding, nn.Linear)


# Depth.


def alternate_layers(total: int, count: int) -> list[int]:
    """`count` of `total` layers at even steps, the first and the last among them.

    DistilBERT (Sanh et al. 2019) takes 0, 2, 4... of a model before fine-tuning. Here the last layer stays, since the
    classification head was trained on what it gives: a six-layer classifier without it changes most answers.

    Raises:
        PassError: not between 1 and `total`.
    """
    if not 1 <= count <= total:
        raise PassError(f"{count} of {total} layers cannot be kept; give 1 to {total}")
    return [step * (total - 1) // max(1, count - 1) for step in range(count)]


# Sharing.


def share_layers(scorer: Scorer, source: int | None = None) -> None:
    """Run one layer as often as there were layers (ALBERT, Lan et al. 2020), in place.

    It starts as a copy of one layer, `source`, the middle one if None; not as the mean of all, for heads and neurons
    of different layers do not correspond: the mean of unrelated weights is close to zero and computes nothing. In
    ModernBERT every layer keeps its kind of attention (local or global), and what is shared are the weights.

    Raises:
        PassError: no such layer.
    """
    anatomy = dissect(scorer)
    layers = anatomy.layers
    source = len(layers) // 2 if source is None else source
    if not 0 <= source < len(layers):
        raise PassError(f"layer {source} cannot be shared; the model has layers 0 to {len(layers) - 1}")
    if not anatomy.plan.shared:
        set_layers(anatomy, [layers[source].module] * len(layers))
        return
    for path in anatomy.plan.shared:
        module = layers[source].module.get_submodule(path)
        for layer in layers:
            if not isinstance(module, nn.Identity) and not isinstance(part(layer.module, path), nn.Identity):
                put(layer.module, path, module)


# Embeddings.


class FactorizedEmbedding(nn.Module):
    """[vocabulary, rank] x [rank, width] in place of [vocabulary, width]. Takes int64 ids of any shape."""

    def __init__(self, table: nn.Embedding, widen: nn.Linear) -> None:
        super().__init__()
        self.table = table
        self.widen = widen

    @property
    def num_embeddings(self) -> int:
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.widen.out_features

    def forward(self, ids: Tensor) -> Tensor:
        widened: Tensor = self.widen(self.table(ids))
        return widened


def factorize_embeddings(scorer: Scorer, rank: int) -> None:
    """Replace the word embedding by its best approximation of this rank (ALBERT, Lan et al. 2020), in place.

    The truncated singular value decomposition `W = (W V) V'`, with V the largest eigenvectors of `W'W`: the same
    factors as of W itself, without decomposing a matrix of a hundred thousand rows. Exact at full rank.

    Raises:
        PassError: the rank is not between 1 and the embedding's width, or the embedding is factorised already.
    """
    anatomy = dissect(scorer)
    words = part(anatomy.base, anatomy.plan.words)
    if not isinstance(words, nn.Embedding):
        raise PassError("the word embedding is factorised already; do it once, with the rank wanted")
    if not 1 <= rank <= words.embedding_dim:
        raise PassError(f"rank {rank} does not fit an embedding of width {words.embedding_dim}")
    weight = words.weight.detach().double()
    basis = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, -rank:].flip(1)
    table = _weighted(nn.Embedding(len(weight), rank, words.padding_idx, device="meta"), weight @ basis, words.weight)
    widen = _weighted(nn.Linear(rank, words.embedding_dim, bias=False, device="meta"), basis, words.weight)
    put(anatomy.base, anatomy.plan.words, FactorizedEmbedding(table, widen).train(words.training))


# Width.


class ProjectedScorer(Scorer):
    """A narrower embedding model whose vectors are as wide as the original's, by one linear layer after pooling."""

    def __init__(self, scorer: Scorer, project: nn.Linear) -> None:
        super().__init__(scorer.model, scorer.task)
        self.project = project
        self.train(scorer.training)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        hidden = self.model(**inputs).last_hidden_state.float()
        narrow = pooled(hidden, attention_mask, self.task.pooling or "mean")
        vectors: Tensor = self.project(narrow.to(self.project.weight.dtype)).float()
        return nn.functional.normalize(vectors, dim=-1) if self.task.normalized else vectors


def shrink_width(scorer: Scorer, hidden: int) -> Scorer:
    """Keep `hidden` of the hidden dimensions everywhere, and as many heads as fit them at the same head size.

    The dimensions that stay carry the most energy into the linear layers, by the weights alone: a layer norm leaves a
    dimension with second moment `gamma^2 + beta^2`, and a linear layer reads it with the norm of its column. Heads go
    by the norm of their columns in the output projection; prune them by importance first to choose better. The
    feed-forward width stays; `prune_neurons` reduces it. A classifier becomes a model that its narrower config
    describes, but for MPNet, whose position bias keeps all heads, and for an ELECTRA or DeBERTa that becomes exactly as
    wide as its embeddings, where transformers leaves out the projection between them.

    Returns:
        The scorer, changed in place; for embeddings another one, which projects to the width of the original.

    Raises:
        PassError: the width does not fit the heads, or the model has been projected or has a grouped convolution.
    """
    anatomy = dissect(scorer)
    size, before = anatomy.layers[0].head_size, anatomy.hidden
    if not 0 < hidden < before or hidden % size:
        raise PassError(f"hidden width {hidden} does not fit; give a multiple of the head size {size} below {before}")
    convolution = part(anatomy.base, "encoder.conv.conv")
    if isinstance(convolution, nn.Conv1d) and convolution.groups > 1:
        raise PassError("a model with a grouped convolution cannot be narrowed; drop layers or prune instead")
    if isinstance(scorer, ProjectedScorer):
        raise PassError("the model is narrowed already; do it once, to the width wanted")
    prune_heads(scorer, [_strongest_heads(layer, hidden // size) for layer in anatomy.layers])
    anatomy = dissect(scorer)
    index = _strongest(_energy(anatomy), hidden)
    for layer in anatomy.distinct():
        for reader in (*layer.projections, layer.up):
            take_columns(reader, index)
        for writer in (layer.output, layer.down):
            take_rows(writer, index)
    _narrow_embeddings(anatomy, index)
    _narrow_rest(anatomy, index)
    _set_config(anatomy, hidden, hidden // size, before)
    if scorer.task.kind is TaskKind.EMBED:
        return _projected(scorer, index, before)
    _narrow_head(anatomy, index)
    return scorer


def _energy(anatomy: Anatomy) -> Tensor:
    """float64 [hidden]: second moment after the norms times squared column norms of what reads it."""
    second = torch.zeros(anatomy.hidden, dtype=torch.float64)
    read = torch.zeros_like(second)
    for norm in _norms(anatomy):
        second += norm.weight.detach().double().square().cpu()
        if norm.bias is not None:
            second += norm.bias.detach().double().square().cpu()
    for layer in anatomy.distinct():
        for reader in (*layer.projections, layer.up):
            read += reader.weight.detach().double().square().sum(dim=0).cpu()
    return second * read


def _embedding_space(anatomy: Anatomy) -> set[nn.Module]:
    """What has the embeddings' own width, in a model that widens them to the hidden one afterwards."""
    plan = anatomy.plan
    widener = part(anatomy.base, plan.widener)
    if widener is None:
        return set()
    inside = set(anatomy.base.get_submodule(plan.embeddings).modules()) - {widener}
    # DeBERTa widens within its embeddings, before their norm.
    if (plan.widener or "").startswith(f"{plan.embeddings}."):
        inside -= {anatomy.base.get_submodule(f"{plan.embeddings}.LayerNorm")}
    return inside


def _norms(anatomy: Anatomy) -> list[nn.LayerNorm]:
    """The norms over the hidden dimensions."""
    space = _embedding_space(anatomy)
    return [module for module in anatomy.base.modules() if isinstance(module, nn.LayerNorm) and module not in space]


def _narrow_embeddings(anatomy: Anatomy, index: Tensor) -> None:
    space = _embedding_space(anatomy)
    # MPNet's position bias is [buckets, heads].
    elsewhere = {part(anatomy.base, "encoder.relative_attention_bias")}
    for module in list(anatomy.base.modules()):
        if isinstance(module, FactorizedEmbedding):
            elsewhere.add(module.table)
            if module not in space:
                take_rows(module.widen, index)
    for module in anatomy.base.modules():
        if isinstance(module, nn.Embedding) and module not in space and module not in elsewhere:
            module.weight = take(module.weight, 1, index)
            module.embedding_dim = len(index)
    if anatomy.plan.widener is not None and part(anatomy.base, anatomy.plan.widener) is not None:
        take_rows(linear(anatomy.base, anatomy.plan.widener), index)


def _narrow_rest(anatomy: Anatomy, index: Tensor) -> None:
    """The norms, and the convolution that some DeBERTas have after their first layer."""
    for norm in _norms(anatomy):
        _narrow_norm(norm, index)
    convolution = part(anatomy.base, "encoder.conv.conv")
    if isinstance(convolution, nn.Conv1d):
        convolution.weight = take(take(convolution.weight, 0, index), 1, index)
        if convolution.bias is not None:
            convolution.bias = take(convolution.bias, 0, index)
        convolution.in_channels = convolution.out_channels = len(index)


def _narrow_norm(norm: nn.LayerNorm, index: Tensor) -> None:
    norm.weight = take(norm.weight, 0, index)
    if norm.bias is not None:
        norm.bias = take(norm.bias, 0, index)
    norm.normalized_shape = (len(index),)


def _narrow_head(anatomy: Anatomy, index: Tensor) -> None:
    """The classification head: its input follows `index`; its inner units stay by the norm of what reads them."""
    first, *norms, last = anatomy.plan.head
    dense, final = linear(anatomy.model, first), linear(anatomy.model, last)
    take_columns(dense, index)
    inner = _strongest(final.weight.detach().double().square().sum(dim=0), len(index))
    take_rows(dense, inner)
    for path in norms:
        _narrow_norm(cast(nn.LayerNorm, anatomy.model.get_submodule(path)), inner)
    take_columns(final, inner)


def _set_config(anatomy: Anatomy, hidden: int, heads: int, before: int) -> None:
    config = anatomy.config
    for name in ("embedding_size", "pooler_hidden_size"):
        # ALBERT and some ELECTRAs have embeddings of another width, which stay.
        if getattr(config, name, None) == before and (name != "embedding_size" or not _embedding_space(anatomy)):
            setattr(config, name, hidden)
    config.num_attention_heads = heads
    config.hidden_size = hidden


def _projected(scorer: Scorer, index: Tensor, width: int) -> ProjectedScorer:
    """Starts by putting each dimension back in its place, with zeros elsewhere."""
    project = nn.Linear(len(index), width, bias=False, device="meta")
    return ProjectedScorer(scorer, _weighted(project, torch.eye(width)[:, index], next(scorer.parameters())))


def _weighted(module: Holder, weight: Tensor, like: Tensor) -> Holder:
    """A new module with this weight, of the type, device and trainability of those that it replaces."""
    values = weight.to(dtype=like.dtype, device=like.device).contiguous()
    module.weight = nn.Parameter(values, requires_grad=like.requires_grad)
    return module


def _strongest(values: Tensor, count: int) -> Tensor:
    """int64 [count], ascending; ties go to the lower index."""
    return torch.sort(values, descending=True, stable=True).indices[:count].sort().values


def _strongest_heads(layer: Layer, count: int) -> list[int]:
    columns = layer.output.weight.detach().double().square().sum(dim=0)
    energy = columns.view(layer.heads, layer.head_size).sum(dim=1)
    return _strongest(energy, min(count, layer.heads)).tolist()
