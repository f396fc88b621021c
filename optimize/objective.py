"""What a distillation minimises: its settings, its data, and the loss of a batch over exits and hidden states.

The formulas are `optimize.losses`; the training loop is `optimize.distill`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from fettle.answers import EMBEDDING_COSINE_FLOOR, Floats
from fettle.errors import UsageError
from fettle.manifest import Head, Strict, Task, TaskKind, TokenizerSpec
from fettle.rows import Row
from optimize import losses
from optimize.batches import tensors
from workers.torch_encoder import Scorer

SMALLEST_SPREAD: Final = 1e-6

Batch = tuple[Tensor, ...]


class DistillSettings(Strict):
    """How to train; `model_dump(mode="json")` is what a manifest records.

    The loss is the sum of four parts: the answers (`soft_weight`), unit-length hidden states (`hidden_weight`), the
    relations among tokens in the last layer (`relation_weight`), and for embeddings who is near to whom in the batch
    (`neighbour_weight`). The second and third need the teacher itself.
    """

    epochs: float = Field(default=3.0, gt=0, description="passes over the training rows; may be a fraction")
    batch_rows: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0, description="the highest; linear warm-up, then linear to 0")
    warm_up: float = Field(default=0.06, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.01, ge=0, description="not on biases and norms")
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of a step's gradient")
    temperature: float = Field(default=2.0, gt=0)
    soft_weight: float = Field(default=1.0, ge=0)
    hidden_weight: float = Field(default=0.0, ge=0)
    relation_weight: float = Field(default=0.0, ge=0)
    neighbour_weight: float = Field(default=0.1, ge=0)
    layer_map: list[int] | None = Field(
        default=None, description="the teacher's layer (from 1) that each student layer imitates; evenly spread if None"
    )
    exit_weights: list[float] | None = Field(
        default=None, description="of a student with exits, the final answer last; all equal if None"
    )
    max_tokens: int | None = Field(default=80, ge=3, description="training rows are cut to this; tuning rows never")
    dropout: bool = Field(
        default=False,
        description="the student is to equal a function that is known without noise, on inputs like those it will see; "
        "noise only blurs it (Beyer et al. 2022, 'A good teacher is patient and consistent')",
    )
    bf16: bool = Field(default=True, description="autocast to bfloat16; weights and optimizer stay in float32")
    evaluations: int = Field(default=8, ge=1, description="on the tuning rows, evenly spread; the last after all steps")
    patience: int = Field(default=3, ge=1, description="stop after this many evaluations without a better one")
    tuning_rows: int = Field(default=1000, ge=1, description="at most this many are evaluated on")
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class DistillData:
    """What to learn: rows with the teacher's values, float32 [rows, width] (logits or vectors), as computed before.

    `tuning_rows` decide which weights are kept. `scorer` is the teacher itself, on the student's device; only the
    losses on hidden states and relations need it. For embeddings, a cosine below `cosine_floor` is a disagreement.
    """

    rows: list[Row]
    teacher: Floats
    tuning_rows: list[Row]
    tuning_teacher: Floats
    task: Task
    tokenizer: TokenizerSpec
    scorer: Scorer | None = None
    cosine_floor: float = EMBEDDING_COSINE_FLOOR


class Objective:
    """The loss of a batch: the answers' loss over all exits, and what `settings` adds to it.

    `projections` take the student's states to the teacher's width where the two differ; they are trained along and
    thrown away.
    """

    def __init__(
        self,
        student: nn.Module,
        data: DistillData,
        settings: DistillSettings,
        device: torch.device,
        stack: ExitStack,
    ) -> None:
        """Watch the hidden states of both models, if they are asked for, until `stack` closes."""
        self._student, self._settings, self._device = student, settings, device
        self._answers = answer_loss(data, settings)
        self._teacher = data.scorer
        self._states: list[_States] = []
        self.projections = nn.ModuleList()
        if settings.hidden_weight or settings.relation_weight:
            assert data.scorer is not None
            self._states = [_States(model) for model in (student, data.scorer)]
            for states in self._states:
                stack.callback(states.close)
            self._pair_layers(data)

    def __call__(self, batch: Batch, values: Tensor) -> Tensor:
        with autocast(self._device, self._settings.bf16):
            outputs = as_list(self._student(*batch))
        shares = exit_shares(self._settings, len(outputs))
        loss = losses.weighted_sum([self._answers(output, values) for output in outputs], shares)
        return loss + self._inner(batch) if self._states else loss

    def _inner(self, batch: Batch) -> Tensor:
        """The losses on what lies between input and answer, after the student's own forward."""
        student, teacher = self._both(batch)
        mask, settings = batch[1], self._settings
        parts: list[Tensor] = []
        if settings.hidden_weight:
            mapped = zip(student, [teacher[layer] for layer in self._layers], self.projections, strict=True)
            gaps = [losses.hidden_states(project(mine.float()), its, mask) for mine, its, project in mapped]
            parts.append(settings.hidden_weight * torch.stack(gaps).mean())
        if settings.relation_weight:
            relations = losses.token_relations(student[-1], teacher[self._layers[-1]], mask, self._heads)
            parts.append(settings.relation_weight * relations)
        return torch.stack(parts).sum()

    def _both(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states after each layer: the student's latest ones, and the teacher's on the same batch.

        The teacher's list starts with the embeddings, so that its layers count from 1.
        """
        assert self._teacher is not None
        with torch.no_grad(), autocast(self._device, self._settings.bf16):
            self._teacher(*batch)
        mine, its = (states.latest for states in self._states)
        return list(mine[1:]), list(its)

    def _pair_layers(self, data: DistillData) -> None:
        """One forward of a single row, to see depths and widths as they are, whatever the config says."""
        batch = tensors(data.rows[:1], data.tokenizer, self._device)
        with torch.no_grad():
            self._student(*batch)
        student, teacher = self._both(batch)
        depth, wide, width = len(teacher) - 1, teacher[-1].shape[-1], student[-1].shape[-1]
        layers = self._settings.layer_map or losses.uniform_layers(len(student), depth)
        if len(layers) != len(student) or not all(1 <= layer <= depth for layer in layers):
            raise UsageError(
                f"layer_map {layers} does not fit: it needs one teacher layer from 1 to {depth} for each of the "
                f"student's {len(student)} layers",
                param="layer_map",
            )
        self._layers = layers
        self._heads = losses.relation_heads(width, wide)
        self.projections.extend(
            nn.Identity() if width == wide else nn.Linear(width, wide, bias=False, device=self._device) for _ in layers
        )


class _States:
    """The hidden states of a transformers model's latest forward: after the embeddings, then after each layer."""

    def __init__(self, scorer: nn.Module) -> None:
        model = getattr(scorer, "model", None)
        if not isinstance(model, PreTrainedModel):
            raise UsageError(
                "losses on hidden states and relations need a transformers model as `model` of student and teacher; "
                "set hidden_weight and relation_weight to 0"
            )
        self.latest: tuple[Tensor, ...] = ()
        self._hooks = [
            model.register_forward_pre_hook(_ask_for_states, with_kwargs=True),
            model.register_forward_hook(self._keep),
        ]

    def _keep(self, _model: nn.Module, _inputs: object, output: Any) -> None:
        self.latest = output.hidden_states

    def close(self) -> None:
        self.latest = ()
        for hook in self._hooks:
            hook.remove()


def _ask_for_states(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "output_hidden_states": True}


def answer_loss(data: DistillData, settings: DistillSettings) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss between a student's and the teacher's values [rows, width] that fits the task, weighted."""
    if data.task.kind is TaskKind.EMBED:
        return partial(_embedding_loss, soft=settings.soft_weight, near=settings.neighbour_weight)
    match data.task.head:
        case Head.MULTI_LABEL:
            loss = partial(losses.soft_multi_label, temperature=settings.temperature)
        case Head.REGRESSION:
            loss = partial(losses.soft_regression, scale=max(float(data.teacher.std()), SMALLEST_SPREAD))
        case _:
            loss = partial(losses.soft_single_label, temperature=settings.temperature)
    return partial(_weighted, loss=loss, weight=settings.soft_weight)


def _weighted(student: Tensor, teacher: Tensor, loss: Callable[[Tensor, Tensor], Tensor], weight: float) -> Tensor:
    return weight * loss(student, teacher)


def _embedding_loss(student: Tensor, teacher: Tensor, soft: float, near: float) -> Tensor:
    return soft * losses.cosine_distance(student, teacher) + near * losses.neighbours(student, teacher)


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def as_list(output: Tensor | list[Tensor]) -> list[Tensor]:
    return list(output) if isinstance(output, list | tuple) else [output]


def exit_shares(settings: DistillSettings, answers: int) -> list[float]:
    """The exits' weights, adding up to 1."""
    weights = settings.exit_weights or [1.0] * answers
    if len(weights) != answers or min(weights) < 0 or not sum(weights) > 0:
        raise UsageError(
            f"exit_weights {weights} do not fit a student with {answers} answers; give one weight of at least 0 for "
            "each, not all 0",
            param="exit_weights",
        )
    return [weight / sum(weights) for weight in weights]


def device_of(student: nn.Module) -> torch.device:
    return next(student.parameters()).device
