"""What the distillation of a language model minimises: its settings, and the divergence of a batch's next tokens.

Logits are computed only where a token is to be learnt: a vocabulary is wide, and most of a row is prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fettle.manifest import Strict
from optimize import losses
from optimize.decoder_examples import ExampleBatch
from optimize.objective import autocast, device_of


class TextDistillSettings(Strict):
    """How to train a language model; `model_dump(mode="json")` is what a manifest records.

    The loss of a token is `(1 - reverse) KL(teacher || student) + reverse KL(student || teacher)`, at `temperature`,
    plus `hard_weight` times the cross-entropy of the token that stands there; its mean over the answers' tokens, plus
    `prompt_weight` times its mean over the prompts'.
    """

    epochs: float = Field(default=1.0, gt=0, description="passes over the examples; may be a fraction")
    batch_rows: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0, description="the highest; linear warm-up, then linear to 0")
    warm_up: float = Field(default=0.06, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.01, ge=0, description="not on biases and norms")
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of a step's gradient")
    temperature: float = Field(default=1.0, gt=0)
    reverse: float = Field(default=0.0, ge=0, le=1, description="share of the reverse divergence")
    hard_weight: float = Field(default=0.0, ge=0)
    prompt_weight: float = Field(default=0.0, ge=0, description="0 learns from the answers alone")
    bf16: bool = Field(default=True, description="autocast to bfloat16; weights and optimizer stay in float32")
    evaluations: int = Field(default=8, ge=1, description="on the tuning examples, evenly spread; the last at the end")
    patience: int = Field(default=3, ge=1, description="stop after this many evaluations without a better one")
    tuning_rows: int = Field(default=500, ge=1, description="at most this many are evaluated on")
    seed: int = Field(default=0, ge=0)


def token_loss(student: Tensor, teacher: Tensor, targets: Tensor, settings: TextDistillSettings) -> Tensor:
    """The loss of logits [tokens, vocabulary] with next tokens int64 [tokens], mean over the tokens; 0 of none."""
    if not len(targets):
        # Still a part of the graph.
        return student.float().sum() * 0.0
    total = torch.zeros((), device=student.device)
    if settings.reverse < 1:
        forward = losses.soft_single_label(student, teacher, settings.temperature)
        total = total + (1 - settings.reverse) * forward
    if settings.reverse:
        total = total + settings.reverse * losses.reverse_single_label(student, teacher, settings.temperature)
    if settings.hard_weight:
        total = total + settings.hard_weight * functional.cross_entropy(student.float(), targets)
    return total


class TextObjective:
    """The loss of a batch of examples, of a student against its teacher, which runs along."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, settings: TextDistillSettings) -> None:
        self._student, self._teacher, self._settings = student, teacher, settings
        self._device = device_of(student)

    def __call__(self, batch: ExampleBatch) -> Tensor:
        settings = self._settings
        chosen = batch.answers | batch.prompts if settings.prompt_weight else batch.answers
        with autocast(self._device, settings.bf16):
            with torch.no_grad():
                known = logits_at(self._teacher, batch.ids, chosen)
            said = logits_at(self._student, batch.ids, chosen)
        inside, targets = batch.answers[chosen], batch.targets[chosen]
        loss = token_loss(said[inside], known[inside], targets[inside], settings)
        if settings.prompt_weight:
            rest = ~inside
            loss = loss + settings.prompt_weight * token_loss(said[rest], known[rest], targets[rest], settings)
        return loss


def logits_at(model: PreTrainedModel, ids: Tensor, chosen: Tensor) -> Tensor:
    """float32 [positions, vocabulary] where `chosen`, bool [rows, length], is true, row by row.

    `ids` int64 [rows, length], right-padded. Whatever the model does with logits afterwards (soft caps) is done.
    """
    with _head_sees(model, chosen):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


@contextmanager
def _head_sees(model: PreTrainedModel, chosen: Tensor) -> Iterator[None]:
    """The output embeddings get these positions' states alone, [positions, width], instead of [rows, length, width]."""

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0][chosen],)

    handle = cast(Any, model.get_output_embeddings()).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
