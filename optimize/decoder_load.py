"""A causal language model as a `Reference` that generates: float32, its end tokens, tokenizer and chat template.

Any architecture of transformers with keys and values in its cache is read; which of them has an ONNX graph, and which
can be pruned, is for others to say. Reached through `optimize.load.load_reference`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fettle.chat import Chat, ChatTemplate
from fettle.errors import ModelError, first_line
from fettle.manifest import DecoderSpec, Source, Task, TaskKind, TokenizerSpec
from optimize.anatomy import PLANS as ENCODERS
from optimize.load import Reference
from optimize.source import (
    check_complete,
    check_vocabulary,
    check_weights,
    fingerprint,
    length_limit,
    pad_id,
    read_tokenizer,
)
from workers.torch_decoder import exact_lengths
from workers.torch_encoder import LOADING_ERRORS, Scorer, read_pretrained


class TextScorer(Scorer):
    """A language model as a scorer: the logits of the next token after each row, float32 [rows, vocabulary].

    Rows are right-padded. What generates and trains uses the model itself.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        del token_type_ids  # language models have no segments
        # Causal: no token sees the padding after it.
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        last = attention_mask.long().sum(dim=1) - 1
        return logits[torch.arange(len(last), device=last.device), last].float()


@dataclass(frozen=True)
class DecoderReference(Reference):
    """The user's language model. `tokenizer_json` knows neither padding nor truncation, as for an encoder.

    `chat` is None for a model without a template: prompts are then continued as they stand.
    """

    decoder: DecoderSpec = field(kw_only=True)
    chat: ChatTemplate | None = field(kw_only=True)

    @property
    def language(self) -> PreTrainedModel:
        """The model itself, in float32 and eval mode, its weights not to be trained."""
        return cast(PreTrainedModel, self.model.model)

    def with_student(self, scorer: Scorer) -> DecoderReference:
        """The reference with a student of it in its place, for what is made from it: a graph, a checkpoint."""
        config = cast(PreTrainedModel, scorer.model).config
        return replace(self, model=scorer, config=config, decoder=decoder_spec(config, self.decoder.context))

    @property
    def end_id(self) -> int | None:
        """The token that ends a text that is written for training; None where nothing ends one."""
        return self.task.end_ids[0] if self.task.end_ids else None


def load_decoder(source: str, directory: Path, config: PreTrainedConfig) -> DecoderReference:
    """Load a language model whose files and configuration have been found.

    Raises:
        ModelError: incomplete, unsafe, quantized already, or not a causal language model with keys and values.
    """
    _check_kind(config)
    check_weights(directory)
    notes: dict[str, JsonValue] = {}
    model = read_decoder(directory, torch.float32)
    tokenizer = read_tokenizer(directory)
    vocabulary = cast(Any, model.get_input_embeddings()).num_embeddings
    check_vocabulary(tokenizer, vocabulary, directory)
    spec = decoder_spec(config, length_limit(exact_lengths(config), directory))
    width = cast(nn.Linear, model.get_output_embeddings()).weight.shape[0]
    task = Task(kind=TaskKind.GENERATE, width=width, end_ids=_end_ids(model, tokenizer, width, notes))
    fast = cast(Any, tokenizer).backend_tokenizer
    fast.no_padding()
    fast.no_truncation()
    return DecoderReference(
        model=TextScorer(model, task).eval().requires_grad_(False),
        config=config,
        task=task,
        tokenizer=TokenizerSpec(
            max_length=length_limit([tokenizer.model_max_length, spec.context], directory),
            vocabulary=vocabulary,
            pad_id=pad_id(tokenizer, config, directory, notes),
            segments=False,
        ),
        tokenizer_json=fast.to_str().encode(),
        source=Source(
            name=source,
            architecture=(config.architectures or [type(model).__name__])[0],
            sha256=fingerprint(directory),
        ),
        notes=notes,
        decoder=spec,
        chat=_chat(tokenizer, notes),
    )


def read_decoder(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a directory with `config.json` and safetensors, in eval mode, nothing to be trained.

    Raises:
        ModelError: transformers cannot load it, or some of its weights are missing.
    """
    try:
        model, report = read_pretrained(AutoModelForCausalLM, directory, dtype)
    except LOADING_ERRORS as error:
        raise ModelError(f"{directory}: transformers cannot load the weights ({first_line(error)})") from error
    check_complete(directory, set(report["missing_keys"]) | {str(key) for key in report["mismatched_keys"]})
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def decoder_spec(config: PreTrainedConfig, context: int) -> DecoderSpec:
    """What the keys and values of this architecture look like."""
    heads = config.num_attention_heads
    return DecoderSpec(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        context=context,
    )


def _check_kind(config: PreTrainedConfig) -> None:
    if config.model_type in ENCODERS:
        raise ModelError(f"{config.model_type} is an encoder, not a causal language model that generates text")
    if not getattr(config, "num_attention_heads", None) or not getattr(config, "max_position_embeddings", None):
        raise ModelError(
            f"{config.model_type} keeps no keys and values of bounded length, which Fettle's decoders are built on"
        )
    if getattr(config, "quantization_config", None):
        raise ModelError(
            "the checkpoint is quantized already; give the original one, for Fettle compares all variants with it"
        )


def _end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, width: int, notes: dict[str, JsonValue]
) -> list[int]:
    """What `generate` would stop at; the tokenizer's own end token where nothing is said.

    Its end token comes first, since that is what ends a text written for training.
    """
    generation = getattr(model, "generation_config", None)
    said = getattr(generation, "eos_token_id", None)
    said = model.config.eos_token_id if said is None else said
    said = tokenizer.eos_token_id if said is None else said
    ids = said if isinstance(said, list | tuple) else [] if said is None else [said]
    known = list(dict.fromkeys(int(index) for index in ids if 0 <= index < width))
    if not known:
        notes["end"] = "the checkpoint names no end token; its texts end at their longest length only"
    return sorted(known, key=lambda index: index != tokenizer.eos_token_id)


def _chat(tokenizer: PreTrainedTokenizerBase, notes: dict[str, JsonValue]) -> ChatTemplate | None:
    template = cast(Any, tokenizer).chat_template
    if isinstance(template, dict):
        notes["chat"] = f"of the chat templates {', '.join(sorted(template))}, `default` is used"
        template = template.get("default")
    if not template:
        notes["chat"] = "the checkpoint has no chat template; prompts are continued as they stand"
        return None
    chat = ChatTemplate(source=template, special_tokens=tokenizer.special_tokens_map)
    Chat(chat)  # raises for one that does not compile
    return chat
