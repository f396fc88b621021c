"""Where the parts of a language model are, and how another model of the same kind is made from changed weights.

One table row for each architecture that Fettle can prune. Nothing is changed in place: a smaller configuration makes
a new model, which takes the old weights, cut to fit. So whatever comes out is an ordinary checkpoint.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fettle.errors import PassError, first_line

# From a parameter of the old model to the one of the new.
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DecoderPlan:
    """Paths to the parts; the Llama layout unless said otherwise.

    `layers` starts at the whole model, the other paths at a layer. `qkv` is three projections, or one with the queries'
    rows first, then the keys', then the values'. `up` is gate and up, one with the gate's rows first, or one without a
    gate (`gates` blocks of neurons in each). `transposed`: weights are [inputs, outputs]. `grouped`: the configuration
    can say that there are fewer heads than the hidden width holds. `each_layer` names its lists of one item a layer.
    """

    layers: str = "model.layers"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gates: int = 1
    down: str = "mlp.down_proj"
    transposed: bool = False
    grouped: bool = True
    depth_key: str = "num_hidden_layers"
    neurons_key: str = "intermediate_size"
    each_layer: tuple[str, ...] = ("layer_types", "no_rope_layers")


LLAMA = DecoderPlan()
PLANS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "phi3": DecoderPlan(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",), gates=2),
    "gpt2": DecoderPlan(
        layers="transformer.h",
        qkv=("attn.c_attn",),
        output="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        transposed=True,
        grouped=False,
        depth_key="n_layer",
        neurons_key="n_inner",
    ),
}


@dataclass(frozen=True)
class Block:
    """One layer: `output` takes the heads' values, `down` the neurons' activations."""

    module: nn.Module
    output: nn.Module
    down: nn.Module


@dataclass(frozen=True)
class DecoderAnatomy:
    """A language model taken apart. A group is a head of keys and values with the `queries` heads that read it."""

    plan: DecoderPlan
    model: PreTrainedModel
    blocks: list[Block]
    heads: int
    groups: int
    head_size: int
    neurons: int

    @property
    def queries(self) -> int:
        return self.heads // self.groups

    def name(self, layer: int, path: str) -> str:
        """A module's full name."""
        return f"{self.plan.layers}.{layer}.{path}"

    def rows(self, weight: Tensor) -> int:
        """Which axis of a parameter its outputs are on."""
        return 1 if self.plan.transposed and weight.ndim == 2 else 0


def dissect_decoder(model: PreTrainedModel) -> DecoderAnatomy:
    """Find the parts of a language model.

    Raises:
        PassError: an architecture without a row in the table.
    """
    config = cast(Any, model.config)
    plan = PLANS.get(config.model_type)
    if plan is None:
        raise PassError(
            f"{config.model_type} models cannot be pruned or reshaped; Fettle knows the layers of "
            f"{', '.join(sorted(PLANS))}. Quantization does not need that"
        )
    layers = cast(nn.ModuleList, model.get_submodule(plan.layers))
    blocks = [Block(layer, layer.get_submodule(plan.output), layer.get_submodule(plan.down)) for layer in layers]
    heads = config.num_attention_heads
    down = cast(Tensor, blocks[0].down.weight)
    return DecoderAnatomy(
        plan=plan,
        model=model,
        blocks=blocks,
        heads=heads,
        groups=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        neurons=down.shape[0 if plan.transposed else 1],
    )


def rebuilt(
    anatomy: DecoderAnatomy,
    settings: Mapping[str, object],
    changes: Mapping[str, Change],
    layers: list[int] | None = None,
) -> PreTrainedModel:
    """A new model with `settings` in its configuration and the old one's weights, changed and renumbered.

    Args:
        changes: by the name of a module of the old model; applied to its weight and to its bias.
        layers: which of the old layers it has, in order; all if None.

    Raises:
        PassError: transformers refuses the configuration, or the weights do not fit it.
    """
    model = anatomy.model
    old = cast(Any, model.config)
    try:
        config = type(old).from_dict({**old.to_dict(), **settings})
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = first_line(error.__cause__ or error)
        raise PassError(f"no {old.model_type} configuration can say that ({reason}); choose another size") from error
    numbers = {layer: place for place, layer in enumerate(range(len(anatomy.blocks)) if layers is None else layers)}
    weights = _renumbered(anatomy.plan.layers, model.state_dict(), numbers, changes)
    like = next(model.parameters())
    # Drawn at random only to be replaced; the caller's sequence of random numbers goes on untouched.
    with torch.random.fork_rng(devices=[]):
        fresh = AutoModelForCausalLM.from_config(
            config, dtype=like.dtype, attn_implementation=old._attn_implementation
        ).to(like.device)
    try:
        fresh.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise PassError(
            f"the pruned weights do not fit transformers' {old.model_type} ({first_line(error)})"
        ) from error
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return cast(PreTrainedModel, fresh.train(model.training).requires_grad_(like.requires_grad))


def _renumbered(
    layers: str, state: Mapping[str, Tensor], numbers: Mapping[int, int], changes: Mapping[str, Change]
) -> dict[str, Tensor]:
    """The old state without the layers that go, changed."""
    place = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    result = {}
    for name, value in state.items():
        change = changes.get(name.rpartition(".")[0])
        found = place.match(name)
        if found is not None:
            layer = int(found[1])
            if layer not in numbers:
                continue
            name = f"{layers}.{numbers[layer]}.{name[found.end() :]}"
        result[name] = value if change is None else change(value)
    return result
