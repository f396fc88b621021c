"""A student: the reference after structural operations, written so that it can be built again.

`config.json` is the reference's, `shape.json` lists the operations with all their parameters, `model.safetensors`
holds the weights. The structure is rebuilt by doing the operations on a model of that config, and the weights then
have to fit it exactly. No pickle.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig

from fettle.errors import FamilyError, PassError, first_line
from fettle.manifest import Strict, Task, TaskKind
from optimize import prune, reshape
from optimize.load import Reference
from workers.torch_encoder import Scorer

WEIGHTS = "model.safetensors"
SHAPE = "shape.json"


class KeepLayers(Strict):
    """Drop all layers but these, from 0."""

    kind: Literal["keep_layers"] = "keep_layers"
    layers: list[int]


class PruneHeads(Strict):
    """The heads that each layer keeps."""

    kind: Literal["prune_heads"] = "prune_heads"
    keep: list[list[int]]


class PruneNeurons(Strict):
    """The feed-forward neurons that each layer keeps."""

    kind: Literal["prune_neurons"] = "prune_neurons"
    keep: list[list[int]]


class ShareLayers(Strict):
    """Every layer has the weights of `source`."""

    kind: Literal["share_layers"] = "share_layers"
    source: int


class FactorizeEmbeddings(Strict):
    """The word embedding as a product through `rank` dimensions."""

    kind: Literal["factorize_embeddings"] = "factorize_embeddings"
    rank: int


class ShrinkWidth(Strict):
    """`hidden` dimensions, and as many heads as fit them."""

    kind: Literal["shrink_width"] = "shrink_width"
    hidden: int


Operation = Annotated[
    KeepLayers | PruneHeads | PruneNeurons | ShareLayers | FactorizeEmbeddings | ShrinkWidth,
    Field(discriminator="kind"),
]


class Shape(Strict):
    """The content of `shape.json`."""

    operations: list[Operation]


def apply(scorer: Scorer, operation: Operation) -> Scorer:
    """Do one operation in place; the scorer to go on with is the one returned.

    Raises:
        PassError: the operation does not fit the model.
    """
    match operation:
        case KeepLayers(layers=layers):
            prune.keep_layers(scorer, layers)
        case PruneHeads(keep=keep):
            prune.prune_heads(scorer, keep)
        case PruneNeurons(keep=keep):
            prune.prune_neurons(scorer, keep)
        case ShareLayers(source=source):
            reshape.share_layers(scorer, source)
        case FactorizeEmbeddings(rank=rank):
            reshape.factorize_embeddings(scorer, rank)
        case ShrinkWidth(hidden=hidden):
            return reshape.shrink_width(scorer, hidden)
    return scorer


def make_student(reference: Reference, operations: list[Operation]) -> Scorer:
    """A copy of the reference's scorer after these operations, in order; the reference stays as it is.

    Raises:
        PassError: an operation does not fit the model.
    """
    scorer = copy.deepcopy(reference.model)
    for operation in operations:
        scorer = apply(scorer, operation)
    return scorer


def parameters(scorer: Scorer) -> int:
    """How many weights there are; shared ones count once."""
    return sum(weight.numel() for weight in scorer.parameters())


def save_student(scorer: Scorer, operations: list[Operation], directory: Path, config: PreTrainedConfig) -> None:
    """Write `config.json`, `model.safetensors` and `shape.json`.

    Args:
        scorer: the student, perhaps trained since.
        operations: all that were done to the reference's scorer, in order.
        directory: made if it is missing.
        config: the reference's, not the student's, which the operations have changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config.to_json_file(directory / "config.json", use_diff=False)
    (directory / SHAPE).write_text(Shape(operations=operations).model_dump_json(indent=2) + "\n", encoding="utf-8")
    save_model(scorer, str(directory / WEIGHTS))


def load_student(directory: Path, task: Task) -> Scorer:
    """Build a saved student again, in eval mode, float32, on the CPU.

    Raises:
        FamilyError: the files do not belong together, are damaged or are not there.
    """
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        shape = Shape.model_validate_json((directory / SHAPE).read_bytes())
        scorer = _unshaped(config, task)
        for operation in shape.operations:
            scorer = apply(scorer, operation)
        load_model(scorer, directory / WEIGHTS, strict=True)
    except (PassError, OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise FamilyError(
            f"{directory}: no student that can be built again ({first_line(error)}); run `fettle optimize` again"
        ) from error
    return scorer


def _unshaped(config: PreTrainedConfig, task: Task) -> Scorer:
    """The reference's structure with weights of no meaning."""
    factory = AutoModelForSequenceClassification if task.kind is TaskKind.CLASSIFY else AutoModel
    # The weights are drawn at random only to be replaced; the caller's sequence of random numbers goes on untouched.
    with torch.random.fork_rng(devices=[]):
        model = factory.from_config(config, dtype=torch.float32)
    if task.kind is TaskKind.EMBED and getattr(model, "pooler", None) is not None:
        model.pooler = None
    return Scorer(model, task).eval().requires_grad_(False)
