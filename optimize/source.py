"""The files of a user's checkpoint: found, checked, fingerprinted, and its configuration and tokenizer read.

What the model is for is the business of `optimize.load` and `optimize.decoder_load`. Runs no code from a checkpoint
and reads no pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import JsonValue
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from fettle.errors import ModelError, first_line
from fettle.store import sha256_file

WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
UNWANTED_FILES = ["onnx/*", "openvino/*", "checkpoint-*"]
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
# Above this, a tokenizer's `model_max_length` is transformers' way to say that nobody set it.
SANE_LENGTH = 1_000_000


def located(source: str) -> Path:
    """The directory of a path or a hub id.

    Raises:
        ModelError: there is none, and the hub delivers none.
    """
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


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from None


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_config(directory: Path) -> PreTrainedConfig:
    """Raises ModelError where there is no configuration, or none of an architecture that transformers ships."""
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json; give a directory saved by `save_pretrained`")
    content = read_json(directory / "config.json")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        if "auto_map" in content:
            raise ModelError(
                f"{directory} needs code that comes with the checkpoint (auto_map in config.json), which Fettle never "
                "runs; use a model whose architecture is part of transformers"
            ) from error
        raise ModelError(f"{directory}/config.json: transformers does not know this model ({error})") from error


def check_weights(directory: Path) -> None:
    """Raises ModelError unless there are weights as safetensors."""
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory} has its weights only as pickle ({pickles[0]}), which can run code when it is read; convert "
            "it with `AutoModel...from_pretrained(...).save_pretrained(...)` if you trust it, and give that directory"
        )
    raise ModelError(f"{directory} has no weights (model.safetensors); copy them there or download the model again")


def fingerprint(root: Path) -> str:
    """SHA-256 over the names and contents of the files that make up the model."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and any(relative.match(pattern) for pattern in WANTED_FILES):
            digest.update(f"{relative}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def check_complete(directory: Path, missing: Collection[str]) -> None:
    """Raises ModelError for weights that the files lack; transformers would fill them at random and only log it."""
    names = sorted(missing)
    if names:
        raise ModelError(
            f"{directory}: the weights lack {names[0]}"
            + (f" and {len(names) - 1} more" if names[1:] else "")
            + ", so the model would answer at random; fine-tune it first"
        )


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer; ModelError if there is none."""
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


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary: int, directory: Path) -> None:
    """Raises ModelError for a tokenizer with tokens that the model has no embedding for."""
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{directory}: the tokenizer knows {len(tokenizer)} tokens, the model only {vocabulary}; "
            "they do not belong together"
        )


def length_limit(limits: Iterable[int | None], directory: Path) -> int:
    """The lowest of the limits that somebody set; ModelError if nobody has."""
    sane = [int(limit) for limit in limits if limit is not None and 2 <= limit < SANE_LENGTH]
    if not sane:
        raise ModelError(f"{directory}: no length limit; set model_max_length in tokenizer_config.json")
    return min(sane)


def pad_id(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, directory: Path, notes: dict[str, JsonValue]
) -> int:
    """The token that rows are padded with; the choice of a substitute is noted."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    substitute = config.pad_token_id if config.pad_token_id is not None else tokenizer.eos_token_id
    if substitute is None:
        raise ModelError(f"{directory}: the tokenizer has no padding token; set pad_token in tokenizer_config.json")
    notes["padding"] = f"the tokenizer has no padding token; rows are padded with token {substitute}"
    return int(substitute)
