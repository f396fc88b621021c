"""Where the parts of an encoder are: layers, attention, feed-forward, embeddings, classification head.

One table row for each architecture of transformers that Fettle can operate on, and one reader for all of them.
Reading changes nothing; `set_layers` is the one way to put another list of layers in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from fettle.errors import PassError
from workers.torch_encoder import Scorer

# A batch as the scorer takes it: int64 [rows, length] ids, mask and, where the model reads them, segments.
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan:
    """Paths to the parts; the BERT layout unless said otherwise.

    `layers`, `words`, `embeddings` and `widener` start at the bare encoder, `head` at the whole model, the rest at a
    layer. `widener` is the linear layer from a smaller embedding size to the hidden size, where a model has one.
    `head` leads from the encoder's output to the scores: the first linear layer, norms between, the last one.
    `shared` names what layers have in common when all become one; empty means the layer as a whole.
    """

    layers: str = "encoder.layer"
    attention: str = "attention.self"
    projections: tuple[str, ...] = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    )
    output: str = "attention.output.dense"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    words: str = "embeddings.word_embeddings"
    embeddings: str = "embeddings"
    widener: str | None = None
    head: tuple[str, ...] = ("classifier.dense", "classifier.out_proj")
    shared: tuple[str, ...] = ()


PLANS = {
    "bert": Plan(head=("bert.pooler.dense", "classifier")),
    "roberta": Plan(),
    "xlm-roberta": Plan(),
    "electra": Plan(widener="embeddings_project"),
    "distilbert": Plan(
        layers="transformer.layer",
        attention="attention",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        output="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
        head=("pre_classifier", "classifier"),
    ),
    "albert": Plan(
        layers="encoder.albert_layer_groups",
        attention="attention",
        projections=("attention.query", "attention.key", "attention.value"),
        output="attention.dense",
        up="ffn",
        down="ffn_output",
        widener="encoder.embedding_hidden_mapping_in",
        head=("albert.pooler", "classifier"),
    ),
    "mpnet": Plan(
        attention="attention.attn",
        projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        output="attention.attn.o",
    ),
    "deberta-v2": Plan(
        # The last two are there unless the checkpoint shares them with the content's key and query.
        projections=tuple(
            f"attention.self.{name}"
            for name in ("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj")
        ),
        widener="embeddings.embed_proj",
        head=("pooler.dense", "classifier"),
    ),
    "modernbert": Plan(
        layers="layers",
        attention="attn",
        projections=("attn.Wqkv",),
        output="attn.Wo",
        up="mlp.Wi",
        down="mlp.Wo",
        words="embeddings.tok_embeddings",
        head=("head.dense", "head.norm", "classifier"),
        # The layers alternate between local and global attention, and the first one has no norm before it.
        shared=("attn.Wqkv", "attn.Wo", "attn_norm", "mlp_norm", "mlp"),
    ),
}


@dataclass(frozen=True)
class Layer:
    """One layer as the forward pass runs it; a module that runs n times is n layers.

    `projections` have [blocks x heads x head_size] rows: one block each, or query, key and value in one matrix.
    `up` has [blocks x neurons] rows: one block, or two where a gate multiplies the activation.
    """

    module: nn.Module
    attention: nn.Module
    projections: tuple[nn.Linear, ...]
    output: nn.Linear
    up: nn.Linear
    down: nn.Linear
    head_size: int

    @property
    def heads(self) -> int:
        return self.output.in_features // self.head_size

    @property
    def neurons(self) -> int:
        return self.down.in_features


@dataclass(frozen=True)
class Anatomy:
    """A scorer taken apart. `layers` are in the order of the forward pass."""

    plan: Plan
    model: nn.Module
    base: nn.Module
    config: Any
    layers: list[Layer]

    @property
    def hidden(self) -> int:
        return self.layers[0].output.out_features

    def distinct(self) -> Iterator[Layer]:
        """One layer for each set of weights."""
        yield from {id(layer.output): layer for layer in reversed(self.layers)}.values()


def dissect(scorer: Scorer) -> Anatomy:
    """Find the parts of a scorer's model.

    Raises:
        PassError: an architecture without a row in the table.
    """
    model = cast(Any, scorer.model)
    plan = PLANS.get(model.config.model_type)
    if plan is None:
        raise PassError(
            f"{model.config.model_type} models cannot be pruned or reshaped; Fettle knows the layers of "
            f"{', '.join(sorted(PLANS))}. Quantization and exits do not need that"
        )
    base = model.base_model
    layers = [_layer(plan, module) for module in _modules(plan, base, model.config)]
    return Anatomy(plan, model, base, model.config, layers)


def part(module: nn.Module, path: str | None) -> nn.Module | None:
    """The module at a dotted path, None where there is none."""
    for name in (path or "").split("."):
        found = getattr(module, name, None) if name else None
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def linear(module: nn.Module, path: str) -> nn.Linear:
    """The linear layer at `path`.

    Raises:
        PassError: something else is there; this transformers builds the model in another way.
    """
    found = part(module, path)
    if not isinstance(found, nn.Linear):
        raise PassError(f"{type(module).__name__} has no linear layer {path!r}; transformers has changed, report it")
    return found


def put(module: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)


def set_layers(anatomy: Anatomy, modules: Iterable[nn.Module]) -> None:
    """Make these the encoder's layers; one module may come several times. The config follows.

    ALBERT runs `num_hidden_layers` steps over `num_hidden_groups` groups: one group if all are the same module, as
    many groups as steps otherwise.
    """
    wanted = list(modules)
    plan, base, config = anatomy.plan, anatomy.base, anatomy.config
    if config.model_type == "albert":
        groups = {id(module): _albert_group(base, module) for module in wanted}
        config.inner_group_num = 1
        config.num_hidden_groups = 1 if len(groups) == 1 else len(wanted)
        modules = [groups[id(module)] for module in wanted[: config.num_hidden_groups]]
    else:
        modules = wanted
    put(base, plan.layers, nn.ModuleList(modules))
    if config.model_type == "modernbert":
        config.layer_types = [cast(Any, module).attention_type for module in wanted]
    config.num_hidden_layers = len(wanted)


def _modules(plan: Plan, base: nn.Module, config: Any) -> list[nn.Module]:
    container = base.get_submodule(plan.layers)
    assert isinstance(container, nn.ModuleList)
    if config.model_type != "albert":
        return list(container)
    steps = config.num_hidden_layers
    groups = [container[int(step / (steps / config.num_hidden_groups))] for step in range(steps)]
    return [layer for group in groups for layer in cast(Any, group).albert_layers]


def _layer(plan: Plan, module: nn.Module) -> Layer:
    attention = cast(Any, module.get_submodule(plan.attention))
    # ModernBERT has its own name for it.
    size = attention.head_dim if hasattr(attention, "head_dim") else attention.attention_head_size
    required, optional = plan.projections[:3], plan.projections[3:]
    return Layer(
        module=module,
        attention=attention,
        projections=tuple(linear(module, path) for path in required)
        + tuple(linear(module, path) for path in optional if part(module, path) is not None),
        output=linear(module, plan.output),
        up=linear(module, plan.up),
        down=linear(module, plan.down),
        head_size=int(size),
    )


def _albert_group(base: nn.Module, layer: nn.Module) -> nn.Module:
    """A group of this one layer. Made without its constructor, which would draw random weights."""
    kind = type(cast(nn.ModuleList, base.get_submodule(PLANS["albert"].layers))[0])
    group = kind.__new__(kind)
    nn.Module.__init__(group)
    group.albert_layers = nn.ModuleList([layer])
    return group.train(layer.training)
