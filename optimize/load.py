"""A user's model, by path or hub id, to a `Reference`: the model in float32, its task and its tokenizer.

Reads sequence classifiers, sentence-transformers directories and bare encoders; language models are
`optimize.decoder_load`'s. What it cannot serve faithfully it refuses, by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fettle.errors import ModelError, first_line
from fettle.manifest import DecoderSpec, Head, Source, Task, TaskKind, TokenizerSpec
from optimize.source import (
    check_complete,
    check_vocabulary,
    check_weights,
    fingerprint,
    length_limit,
    located,
    optional_json,
    pad_id,
    read_config,
    read_json,
    read_tokenizer,
)
from workers.torch_encoder import Scorer, build_scorer

Pooling = Literal["mean", "cls", "max"]
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
OLD_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Reference:
    """The user's model: `model` in float32 and eval mode, with what Fettle must know to serve it.

    `notes` says what was assumed or set aside while reading it, in words for the report.
    """

    model: Scorer
    config: PreTrainedConfig
    task: Task
    tokenizer: TokenizerSpec
    tokenizer_json: bytes
    source: Source
    notes: dict[str, JsonValue] = field(default_factory=dict)
    decoder: DecoderSpec | None = None

    @property
    def layers(self) -> int:
        """How many layers run one after the other, shared ones counted each time."""
        return int(self.config.num_hidden_layers)

    @property
    def shares_layers(self) -> bool:
        """Whether all layers are one set of weights already."""
        return bool(self.config.model_type == "albert")


@dataclass(frozen=True)
class Layout:
    """Where the transformer's files are and what the files around it say about its use."""

    directory: Path
    pooling: Pooling | None = None
    normalized: bool = False
    max_length: int | None = None
    lowercase: bool = False
    notes: dict[str, JsonValue] = field(default_factory=dict)


def load_reference(source: str, *, task: TaskKind | None = None) -> Reference:
    """Load a model for `fettle optimize`.

    Args:
        source: a directory, or a hub id.
        task: what to use it for; read from the checkpoint if None.

    Raises:
        ModelError: not found, incomplete, unsafe (pickle, remote code), or of a kind that Fettle does not serve.
    """
    root = located(source)
    layout = _layout(root)
    config = read_config(layout.directory)
    kind = _kind(config, layout, task)
    if kind is TaskKind.GENERATE:
        # A circle otherwise: a decoder's reference is a `Reference` too.
        from optimize.decoder_load import load_decoder

        return load_decoder(source, layout.directory, config)
    check_weights(layout.directory)
    notes = dict(layout.notes)
    answers = _task(config, layout, kind, notes)
    scorer = _scorer(layout.directory, answers)
    tokenizer = read_tokenizer(layout.directory)
    spec = _tokenizer_spec(tokenizer, scorer.model, config, layout, notes)
    text = _tokenizer_json(tokenizer, layout)
    architecture = (config.architectures or [type(scorer.model).__name__])[0]
    return Reference(
        model=scorer,
        config=config,
        task=answers,
        tokenizer=spec,
        tokenizer_json=text,
        source=Source(name=source, architecture=architecture, sha256=fingerprint(root)),
        notes=notes,
    )


def task_kind(source: str, task: TaskKind | None = None) -> TaskKind:
    """What a model is for, from its configuration alone.

    Raises:
        ModelError: as for `load_reference`.
    """
    layout = _layout(located(source))
    return _kind(read_config(layout.directory), layout, task)


# What the files say about the task.


def _layout(root: Path) -> Layout:
    if not (root / "modules.json").is_file():
        return Layout(root)
    settings = optional_json(root / "config_sentence_transformers.json")
    family = settings.get("model_type", "SentenceTransformer")
    if family not in ("SentenceTransformer", "CrossEncoder"):
        raise ModelError(f"{root} is a sentence-transformers {family}, which Fettle does not serve")
    modules = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in read_json(root / "modules.json")}
    strange = [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]
    if strange or "Transformer" not in modules:
        raise ModelError(
            f"{root}/modules.json: Fettle serves Transformer, Pooling and Normalize modules, "
            f"this model has {', '.join(strange) or 'no Transformer'}"
        )
    directory = root / modules["Transformer"]
    sentence = optional_json(directory / "sentence_bert_config.json")
    notes: dict[str, JsonValue] = {}
    if settings.get("default_prompt_name"):
        notes["prompt"] = (
            f"the checkpoint's default prompt {settings['default_prompt_name']!r} is not added; "
            "send it as part of the text"
        )
    return Layout(
        directory=directory,
        pooling=_pooling(root / modules["Pooling"] / "config.json") if "Pooling" in modules else None,
        normalized="Normalize" in modules,
        max_length=sentence.get("max_seq_length"),
        lowercase=bool(sentence.get("do_lower_case")),
        notes=notes,
    )


def _pooling(path: Path) -> Pooling:
    content = read_json(path)
    modes = content.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in OLD_POOLING_KEYS.items() if content.get(key)]
    elif isinstance(modes, str):
        modes = [modes]
    if len(modes) != 1 or modes[0] not in ("mean", "cls", "max"):
        raise ModelError(f"{path}: pooling {'+'.join(modes) or 'none'} is not served; mean, cls and max are")
    return cast(Pooling, modes[0])


def _kind(config: PreTrainedConfig, layout: Layout, wanted: TaskKind | None) -> TaskKind:
    names = config.architectures or []
    classifier = any(name.endswith("ForSequenceClassification") for name in names)
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} is an encoder-decoder, which Fettle does not serve")
    if any(name.endswith(LANGUAGE_MODELS) for name in names) or wanted is TaskKind.GENERATE:
        return _language(config, wanted)
    if wanted is TaskKind.CLASSIFY and not classifier:
        raise ModelError(f"{', '.join(names) or config.model_type} has no classification head; use --task embed")
    if wanted is None and not classifier and layout.pooling is None and any("For" in name for name in names):
        tasks = [name for name in names if not name.endswith(("ForMaskedLM", "ForPreTraining"))]
        if tasks:
            raise ModelError(f"{tasks[0]} is not served; Fettle serves sequence classifiers and embedding models")
    if wanted is not None:
        return wanted
    return TaskKind.CLASSIFY if classifier and layout.pooling is None else TaskKind.EMBED


def _language(config: PreTrainedConfig, wanted: TaskKind | None) -> TaskKind:
    name = (config.architectures or [config.model_type])[0]
    if not name.endswith(LANGUAGE_MODELS):
        raise ModelError(f"{name} is not a causal language model, so it generates no text; leave --task away")
    if wanted not in (None, TaskKind.GENERATE):
        raise ModelError(f"{name} is a language model, which Fettle serves for --task generate alone")
    return TaskKind.GENERATE


def _task(config: PreTrainedConfig, layout: Layout, kind: TaskKind, notes: dict[str, JsonValue]) -> Task:
    if kind is TaskKind.CLASSIFY:
        return Task(kind=kind, head=_head(config), labels=_labels(config), width=config.num_labels)
    normalized = layout.normalized
    if layout.pooling is None:
        normalized = True
        notes["pooling"] = "the checkpoint names no pooling: mean over the tokens, then normalised to length 1"
    return Task(kind=kind, width=config.hidden_size, pooling=layout.pooling or "mean", normalized=normalized)


def _head(config: PreTrainedConfig) -> Head:
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return Head.REGRESSION
    return Head.MULTI_LABEL if config.problem_type == "multi_label_classification" else Head.SINGLE_LABEL


def _labels(config: PreTrainedConfig) -> list[str]:
    names = config.id2label or {}
    return [str(names.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]


def _scorer(directory: Path, task: Task) -> Scorer:
    try:
        scorer, report = build_scorer(directory, task, torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{directory}: transformers cannot load the weights ({first_line(error)})") from error
    missing = set(report["missing_keys"]) | {str(key) for key in report["mismatched_keys"]}
    check_complete(directory, {key for key in missing if task.kind is TaskKind.CLASSIFY or "pooler." not in key})
    return scorer


# Tokenizer.


def _tokenizer_spec(
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    config: PreTrainedConfig,
    layout: Layout,
    notes: dict[str, JsonValue],
) -> TokenizerSpec:
    vocabulary = cast(Any, model).get_input_embeddings().num_embeddings
    check_vocabulary(tokenizer, vocabulary, layout.directory)
    limits = [tokenizer.model_max_length, layout.max_length, _positions(model, config)]
    return TokenizerSpec(
        max_length=length_limit(limits, layout.directory),
        vocabulary=vocabulary,
        pad_id=pad_id(tokenizer, config, layout.directory, notes),
        segments=bool(getattr(config, "type_vocab_size", 0) > 1) and "token_type_ids" in _arguments(model),
    )


def _positions(model: nn.Module, config: PreTrainedConfig) -> int | None:
    """The longest row that the model's positions allow.

    RoBERTa, XLM-R and MPNet number positions from `padding_idx + 1`, and mark the table with that padding index.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit < 2:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return int(limit) - module.padding_idx - 1
    return int(limit)


def _arguments(model: nn.Module) -> list[str]:
    # Follows `__wrapped__` through the decorators that transformers puts around `forward`.
    return list(inspect.signature(type(model).forward).parameters)


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase, layout: Layout) -> bytes:
    fast = FastTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    fast.no_padding()
    fast.no_truncation()
    if layout.lowercase:
        lower = normalizers.Lowercase()
        fast.normalizer = lower if fast.normalizer is None else normalizers.Sequence([lower, fast.normalizer])
    return fast.to_str().encode()
