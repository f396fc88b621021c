"""A user's model, by path or hub id, to a `Reference`: the model in float32, its task and its tokenizer.

Reads sequence classifiers, sentence-transformers directories and bare encoders. Runs no code from a checkpoint and
reads no pickle. What it cannot serve faithfully it refuses, by name.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import JsonValue
from safetensors import SafetensorError
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from fettle.errors import ModelError, first_line
from fettle.manifest import Head, Source, Task, TaskKind, TokenizerSpec
from fettle.store import sha256_file
from workers.torch_encoder import Scorer, build_scorer

Pooling = Literal["mean", "cls", "max"]
WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
UNWANTED_FILES = ["onnx/*", "openvino/*", "checkpoint-*"]
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
# Above this, a tokenizer's `model_max_length` is transformers' way to say that nobody set it.
SANE_LENGTH = 1_000_000
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
    root = _located(source)
    layout = _layout(root)
    config = _config(layout.directory)
    kind = _kind(config, layout, task)
    _check_weights(layout.directory)
    notes = dict(layout.notes)
    answers = _task(config, layout, kind, notes)
    scorer = _scorer(layout.directory, answers)
    tokenizer = _tokenizer(layout.directory)
    spec = _tokenizer_spec(tokenizer, scorer.model, config, layout, notes)
    text = _tokenizer_json(tokenizer, layout)
    architecture = (config.architectures or [type(scorer.model).__name__])[0]
    return Reference(
        model=scorer,
        config=config,
        task=answers,
        tokenizer=spec,
        tokenizer_json=text,
        source=Source(name=source, architecture=architecture, sha256=_fingerprint(root)),
        notes=notes,
    )


# Finding the files.


def _located(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{source} is a file; give the directory that holds config.json and model.safetensors")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"{source}: no such directory")
    return _downloaded(source)


def _downloaded(source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES))
    except HFValidationError:
        raise ModelError(f"{source}: no such directory, and not a hub id either") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{source}: no such directory, and the hub did not deliver a model of that name "
            f"({type(error).__name__}); check the spelling and the network, or give a local directory"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from None


def _optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _config(directory: Path) -> PreTrainedConfig:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json; give a directory saved by `save_pretrained`")
    content = _read_json(directory / "config.json")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        if "auto_map" in content:
            raise ModelError(
                f"{directory} needs code that comes with the checkpoint (auto_map in config.json), which Fettle never "
                "runs; use a model whose architecture is part of transformers"
            ) from error
        raise ModelError(f"{directory}/config.json: transformers does not know this model ({error})") from error


def _check_weights(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory} has its weights only as pickle ({pickles[0]}), which can run code when it is read; convert "
            "it with `AutoModel...from_pretrained(...).save_pretrained(...)` if you trust it, and give that directory"
        )
    raise ModelError(f"{directory} has no weights (model.safetensors); copy them there or download the model again")


def _fingerprint(root: Path) -> str:
    """SHA-256 over the names and contents of the files that make up the model."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and any(relative.match(pattern) for pattern in WANTED_FILES):
            digest.update(f"{relative}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


# What the files say about the task.


def _layout(root: Path) -> Layout:
    if not (root / "modules.json").is_file():
        return Layout(root)
    settings = _optional_json(root / "config_sentence_transformers.json")
    family = settings.get("model_type", "SentenceTransformer")
    if family not in ("SentenceTransformer", "CrossEncoder"):
        raise ModelError(f"{root} is a sentence-transformers {family}, which Fettle does not serve")
    modules = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in _read_json(root / "modules.json")}
    strange = [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]
    if strange or "Transformer" not in modules:
        raise ModelError(
            f"{root}/modules.json: Fettle serves Transformer, Pooling and Normalize modules, "
            f"this model has {', '.join(strange) or 'no Transformer'}"
        )
    directory = root / modules["Transformer"]
    sentence = _optional_json(directory / "sentence_bert_config.json")
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
    content = _read_json(path)
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
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise ModelError(f"{names[0]} is a language model; Fettle serves encoders so far")
    if wanted is TaskKind.CLASSIFY and not classifier:
        raise ModelError(f"{', '.join(names) or config.model_type} has no classification head; use --task embed")
    if wanted is None and not classifier and layout.pooling is None and any("For" in name for name in names):
        tasks = [name for name in names if not name.endswith(("ForMaskedLM", "ForPreTraining"))]
        if tasks:
            raise ModelError(f"{tasks[0]} is not served; Fettle serves sequence classifiers and embedding models")
    if wanted is not None:
        return wanted
    return TaskKind.CLASSIFY if classifier and layout.pooling is None else TaskKind.EMBED


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
    # transformers would fill what is missing at random and only log it.
    missing = sorted(set(report["missing_keys"]) | {str(key) for key in report["mismatched_keys"]})
    missing = [key for key in missing if task.kind is TaskKind.CLASSIFY or "pooler." not in key]
    if missing:
        raise ModelError(
            f"{directory}: the weights lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ", so the model would answer at random; fine-tune it first"
        )
    return scorer


# Tokenizer.


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    # Without any of these transformers makes up a tokenizer that knows no words.
    if not any(file for pattern in VOCABULARIES for file in directory.glob(pattern)):
        raise ModelError(f"{directory} has no tokenizer (tokenizer.json); save it there with `save_pretrained`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"{directory}: no tokenizer that transformers can load ({first_line(error)})") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{directory}: {type(tokenizer).__name__} has no fast version; convert it to tokenizer.json first"
        )
    return tokenizer


def _tokenizer_spec(
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    config: PreTrainedConfig,
    layout: Layout,
    notes: dict[str, JsonValue],
) -> TokenizerSpec:
    vocabulary = cast(Any, model).get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{layout.directory}: the tokenizer knows {len(tokenizer)} tokens, the model only {vocabulary}; "
            "they do not belong together"
        )
    limits = [tokenizer.model_max_length, layout.max_length, _positions(model, config)]
    sane = [int(limit) for limit in limits if limit is not None and 2 <= limit < SANE_LENGTH]
    if not sane:
        raise ModelError(f"{layout.directory}: no length limit; set model_max_length in tokenizer_config.json")
    return TokenizerSpec(
        max_length=min(sane),
        vocabulary=vocabulary,
        pad_id=_pad_id(tokenizer, config, layout.directory, notes),
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


def _pad_id(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, directory: Path, notes: dict[str, JsonValue]
) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    substitute = config.pad_token_id if config.pad_token_id is not None else tokenizer.eos_token_id
    if substitute is None:
        raise ModelError(f"{directory}: the tokenizer has no padding token; set pad_token in tokenizer_config.json")
    notes["padding"] = f"the tokenizer has no padding token; rows are padded with token {substitute}"
    return int(substitute)


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
