"""A causal language model of transformers as plain parts: weights as arrays, and what each layer does with them.

Everything in which the architectures differ is said here in one vocabulary, so that the graph is written without
knowing them. What these words cannot say exactly is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fettle.errors import PassError
from fettle.manifest import DecoderSpec

Floats = NDArray[np.float32]

GEMMAS = ("gemma2", "gemma3_text")
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", *GEMMAS)
# These have a window in the configuration alone; the others have it in each layer that slides.
WINDOW_IN_ALL_LAYERS = ("mistral", "phi3")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Their angles depend on how long the text has become only beyond a length that the context can stay below.
BOUNDED_ROTARY = {"longrope": "original_max_position_embeddings"}
EXACT_ROTARY = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ONE_ROTARY = "rotary"
# GroupQueryAttention has heads of so many values, or a multiple, and turns so many by angles.
HEAD_STEP = 16


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ `weight` [inputs, outputs] + `bias` [outputs]."""

    weight: Floats
    bias: Floats | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """x / sqrt(mean(x^2) + `epsilon`) * `gain`, over the last axis."""

    gain: Floats
    epsilon: float


@dataclass(frozen=True, slots=True)
class Attention:
    """`qkv` gives the heads of queries, then of keys, then of values. Scores are products of the two as they are: what
    the model scales them by is in the weights of the queries, or in the gain of their norm.

    Attributes:
        softcap: scores s become softcap * tanh(s / softcap); 0 for none.
        window: how many of the latest tokens are seen, the new one among them; None for all.
        rotary: the name of its table of angles; None for none.
        query_norm, key_norm: of each head, before the angles.
    """

    qkv: Linear
    out: Linear
    heads: int
    kv_heads: int
    head_dim: int
    softcap: float
    window: int | None
    rotary: str | None
    query_norm: Norm | None
    key_norm: Norm | None


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(activation(gate(x)) * up(x)); `gate_up` gives the gate, then the other half."""

    gate_up: Linear
    down: Linear
    activation: str


@dataclass(frozen=True, slots=True)
class Layer:
    """x += after(attention(before(x))), then the same with `mlp`."""

    attention: Attention
    mlp: Mlp
    before_attention: Norm
    after_attention: Norm | None
    before_mlp: Norm
    after_mlp: Norm | None


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin of each position's angles, [context, angles]; they turn the first 2 * angles values of a head."""

    cos: Floats
    sin: Floats


def decoder_spec(config: PreTrainedConfig, context: int | None = None) -> DecoderSpec:
    """What a runner must know. `context` bounds the tokens of a slot further than the configuration does.

    Raises:
        PassError: an architecture, or a setting of one, that the graph cannot say exactly.
    """
    _check_config(config)
    longest = min([config.max_position_embeddings, *_exact_lengths(config)])
    return DecoderSpec(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        context=longest if context is None else min(context, longest),
    )


class Parts:
    """The parts of one model. Layers are read one at a time, so that no second copy of all weights is needed."""

    def __init__(self, model: PreTrainedModel, context: int | None = None) -> None:
        """Raises PassError as `decoder_spec` does, and for weights that are not float32."""
        self.config = model.config
        self.spec = decoder_spec(model.config, context)
        self._model = model
        self._body: Any = model.model
        self._head: Any = model.get_output_embeddings()
        self._gemma = model.config.model_type in GEMMAS
        kinds = {parameter.dtype for parameter in model.parameters()}
        if kinds != {torch.float32}:
            raise PassError(f"the decoder graph is made from float32 weights; this model has {sorted(map(str, kinds))}")

    @property
    def table(self) -> Floats:
        """[vocabulary, hidden], the embedding of each token before `table_scale`."""
        return _array(self._body.embed_tokens.weight)

    @property
    def table_scale(self) -> float:
        return float(getattr(self._body.embed_tokens, "embed_scale", 1.0))

    @property
    def head(self) -> Linear | None:
        """From hidden states to logits; None where the embedding table is the weight."""
        tied = self._head.weight.data_ptr() == self._body.embed_tokens.weight.data_ptr()
        return None if tied and self._head.bias is None else _linear(self._head)

    @property
    def logit_softcap(self) -> float:
        return float(getattr(self.config, "final_logit_softcapping", None) or 0.0)

    @property
    def norm(self) -> Norm:
        return self._norm(self._body.norm)

    def rotaries(self) -> dict[str, Rotary]:
        """The tables of angles by name, as transformers itself computes them."""
        positions = torch.arange(self.spec.context)[None]
        unused = torch.zeros(1)
        names = sorted(set(self.config.layer_types)) if self._per_kind() else [ONE_ROTARY]
        tables = {}
        for name in names:
            kind = {"layer_type": name} if self._per_kind() else {}
            with torch.inference_mode():
                cos, sin = self._body.rotary_emb(unused, position_ids=positions, **kind)
            # Both halves of a head are turned by the same angles.
            angles = cos.shape[-1] // 2
            tables[name] = Rotary(_array(cos[0, :, :angles]), _array(sin[0, :, :angles]))
        return tables

    def layers(self) -> Iterator[Layer]:
        for index, block in enumerate(self._body.layers):
            before_mlp = block.pre_feedforward_layernorm if self._gemma else block.post_attention_layernorm
            yield Layer(
                attention=self._attention(block.self_attn, index),
                mlp=self._mlp(block.mlp),
                before_attention=self._norm(block.input_layernorm),
                after_attention=self._norm(block.post_attention_layernorm) if self._gemma else None,
                before_mlp=self._norm(before_mlp),
                after_mlp=self._norm(block.post_feedforward_layernorm) if self._gemma else None,
            )

    def _attention(self, module: Any, index: int) -> Attention:
        packed = hasattr(module, "qkv_proj")
        projections = [module.qkv_proj] if packed else [module.q_proj, module.k_proj, module.v_proj]
        scale, query_norm = float(module.scaling), None
        if hasattr(module, "q_norm"):
            norm = self._norm(module.q_norm)
            query_norm, scale = Norm(norm.gain * np.float32(scale), norm.epsilon), 1.0
        return Attention(
            qkv=_linear(*projections, scale=scale, scaled=self.config.num_attention_heads * self.spec.head_dim),
            out=_linear(module.o_proj),
            heads=self.config.num_attention_heads,
            kv_heads=self.spec.kv_heads,
            head_dim=self.spec.head_dim,
            softcap=float(getattr(module, "attn_logit_softcapping", None) or 0.0),
            window=self._window(module),
            rotary=self._rotary(module, index),
            query_norm=query_norm,
            key_norm=self._norm(module.k_norm) if hasattr(module, "k_norm") else None,
        )

    def _window(self, module: Any) -> int | None:
        everywhere = self.config.model_type in WINDOW_IN_ALL_LAYERS
        window = getattr(self.config if everywhere else module, "sliding_window", None)
        return window if window is not None and window < self.spec.context else None

    def _rotary(self, module: Any, index: int) -> str | None:
        if not getattr(module, "use_rope", True):
            return None
        return self.config.layer_types[index] if self._per_kind() else ONE_ROTARY

    def _mlp(self, module: Any) -> Mlp:
        packed = hasattr(module, "gate_up_proj")
        return Mlp(
            gate_up=_linear(module.gate_up_proj) if packed else _linear(module.gate_proj, module.up_proj),
            down=_linear(module.down_proj),
            activation=ACTIVATIONS[_activation(self.config)],
        )

    def _norm(self, module: Any) -> Norm:
        """Gemma keeps the distance of a gain from 1."""
        gain = _array(module.weight)
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        return Norm(1 + gain if self._gemma else gain, float(epsilon))

    def _per_kind(self) -> bool:
        return bool(self.config.model_type == "gemma3_text")


def _check_config(config: PreTrainedConfig) -> None:
    if config.model_type not in SUPPORTED:
        raise PassError(
            f"there is no ONNX decoder graph for the architecture {config.model_type!r}; it has them for "
            f"{', '.join(SUPPORTED)}. The torch runtime serves the others"
        )
    if _activation(config) not in ACTIVATIONS:
        raise PassError(f"the decoder graph has no activation {_activation(config)!r}")
    if getattr(config, "use_bidirectional_attention", False):
        raise PassError("the decoder graph is causal; this model's attention looks at later tokens too")
    for settings in _rotary_settings(config):
        size = _head_dim(config)
        turned = int(size * settings.get("partial_rotary_factor", 1.0))
        if size % HEAD_STEP or turned % HEAD_STEP:
            raise PassError(
                f"ONNX Runtime's attention has heads of a multiple of {HEAD_STEP} values, and turns such a multiple of "
                f"them; this model turns {turned} of {size}. The torch runtime serves it"
            )
        if settings["rope_type"] not in EXACT_ROTARY:
            raise PassError(f"the decoder graph has no rotary embedding of the kind {settings['rope_type']!r}")


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _activation(config: PreTrainedConfig) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _rotary_settings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """One for the model, or one for each kind of layer."""
    settings = config.rope_parameters
    if "rope_type" in settings:
        return [settings]
    return [each for each in settings.values() if each is not None]


def _exact_lengths(config: PreTrainedConfig) -> list[int]:
    """Up to which lengths the angles do not depend on a text's length."""
    settings = [each for each in _rotary_settings(config) if each["rope_type"] in BOUNDED_ROTARY]
    return [int(each[BOUNDED_ROTARY[each["rope_type"]]]) for each in settings]


def _linear(*modules: nn.Linear, scale: float = 1.0, scaled: int = 0) -> Linear:
    """Several layers that read the same input, side by side; the first `scaled` outputs times `scale`."""
    weight = torch.cat([module.weight.data for module in modules])
    biases = [module.bias.data for module in modules if module.bias is not None]
    bias = torch.cat(biases) if biases else None
    if scale != 1.0:
        weight[:scaled] *= scale
        if bias is not None:
            bias[:scaled] *= scale
    return Linear(_array(weight.t()), None if bias is None else _array(bias))


def _array(tensor: torch.Tensor) -> Floats:
    array: Floats = tensor.detach().to(torch.float32).contiguous().numpy()
    return array
