"""Distillation: train a student (pruned, narrower, shared, shallower, with exits) to answer as its teacher does.

The teacher's answers are computed beforehand; it runs again only for the losses on hidden states and relations. The
student is trained where it is, on the CPU or on CUDA, on as many threads as torch has been given. Making students
is the business of other passes; so is writing what comes out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fettle.answers import Floats, cosine, disagreements
from fettle.errors import PassError, UsageError
from fettle.manifest import Strict, TaskKind
from optimize.batches import by_length, shortened, tensors, training_batches
from optimize.objective import (
    DistillData,
    DistillSettings,
    Objective,
    answer_loss,
    as_list,
    autocast,
    device_of,
    exit_shares,
)
from optimize.training import (
    PLAIN_ATTENTION_TOKENS,
    STEPS_PER_REPORT,
    Report,
    adamw,
    check_loss,
    plain_attention,
    slope,
)

__all__ = ["DistillData", "DistillResult", "DistillSettings", "Evaluation", "distill"]


class Evaluation(Strict):
    """The student after `step` steps. `loss`: mean over the training steps since the one before, None before any.

    `disagreements`: share of the tuning rows that each exit answers otherwise than the teacher, the final answer
    last. `disagreement` is their mean by the exits' weights, and `distance` that of the answers' own loss (for
    embeddings 1 - cosine), which decides between equals.
    """

    step: int
    loss: float | None
    disagreement: float
    disagreements: list[float]
    distance: float


class DistillResult(Strict):
    """What the training did. `best` is the evaluation whose weights the student has now."""

    steps: int
    planned_steps: int
    epochs: float
    seconds: float
    rows_per_second: float = Field(description="training rows, without the time that evaluating took")
    best: Evaluation
    history: list[Evaluation]
    stopped_early: bool


def distill(student: nn.Module, data: DistillData, settings: DistillSettings, report: Report) -> DistillResult:
    """Train those parameters of the student that require a gradient, in place; keep the best weights seen.

    `student(*batch)` gives float32 [rows, width], or a list of them, exits first and the final answer last. The
    weights that it came with count as seen, so training never makes it worse on the tuning rows. Answers on tuning
    rows are computed in the precision of the training. On the CPU the same seed and number of threads give the same
    weights bit for bit; the global random state stays as it is.

    Raises:
        UsageError: data and settings do not fit together.
        PassError: the loss is no longer a number, or the teacher's values are none.
    """
    _check(student, data, settings)
    device = device_of(student)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(settings.seed)
        if device.type == "cpu" and _longest(data, settings) <= PLAIN_ATTENTION_TOKENS:
            stack.enter_context(plain_attention(student))
        result = _Training(student, data, settings, stack).run(report)
    student.eval()
    return result


class _Training:
    """One run: the optimizer, what is minimised, and the running figures."""

    def __init__(self, student: nn.Module, data: DistillData, settings: DistillSettings, stack: ExitStack) -> None:
        limit = settings.max_tokens
        self.student, self.data, self.settings = student, data, settings
        self.rows = data.rows if limit is None else [shortened(row, limit) for row in data.rows]
        self.planned = max(1, round(settings.epochs * len(data.rows) / settings.batch_rows))
        self.device = device_of(student)
        self.objective = Objective(student, data, settings, self.device, stack)
        self.judge = _Judge(student, data, settings, self.device)
        modules = [student, self.objective.projections]
        self.weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        self.optimizer = adamw(self.weights, settings.learning_rate, settings.weight_decay)
        self.schedule = LambdaLR(self.optimizer, slope(self.planned, settings.warm_up))
        self.steps, self.trained, self.seconds = 0, 0, 0.0

    def run(self, report: Report) -> DistillResult:
        started = time.perf_counter()
        self.judge.evaluate(0, None)
        evaluations = self.settings.evaluations
        ends = sorted({max(1, round(self.planned * (count + 1) / evaluations)) for count in range(evaluations)})
        batches = training_batches([len(row) for row in self.rows], self.settings.batch_rows, self.settings.seed)
        for end in ends:
            mark = time.perf_counter()
            loss = self._train(islice(batches, end - self.steps), report)
            self.seconds += time.perf_counter() - mark
            self.judge.evaluate(end, loss)
            if self.judge.waited >= self.settings.patience:
                break
        self.judge.restore_best()
        return DistillResult(
            steps=self.steps,
            planned_steps=self.planned,
            epochs=self.trained / len(self.rows),
            seconds=time.perf_counter() - started,
            rows_per_second=self.trained / max(self.seconds, 1e-9),
            best=self.judge.best,
            history=self.judge.history,
            stopped_early=self.steps < self.planned,
        )

    def _train(self, batches: Iterator[NDArray[np.int64]], report: Report) -> float:
        """A step for each batch; returns the mean loss."""
        self.student.train(self.settings.dropout)
        first, total = self.steps, torch.zeros((), device=self.device)
        for chosen in batches:
            total += self._step(chosen)
            self.steps += 1
            self.trained += len(chosen)
            if self.steps % STEPS_PER_REPORT == 0:
                check_loss(total, self.steps, self.settings.learning_rate)
                report(self.steps / self.planned)
        check_loss(total, self.steps, self.settings.learning_rate)
        report(self.steps / self.planned)
        return float(total) / (self.steps - first)

    def _step(self, chosen: NDArray[np.int64]) -> Tensor:
        batch = tensors([self.rows[index] for index in chosen], self.data.tokenizer, self.device)
        loss = self.objective(batch, torch.from_numpy(self.data.teacher[chosen]).to(self.device))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.weights, self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss.detach()


class _Judge:
    """Compares the student with the teacher on tuning rows, and keeps the weights that did best."""

    def __init__(self, student: nn.Module, data: DistillData, settings: DistillSettings, device: torch.device) -> None:
        chosen = np.random.default_rng(settings.seed).permutation(len(data.tuning_rows))[: settings.tuning_rows]
        self._student, self._data, self._settings, self._device = student, data, settings, device
        self._rows = [data.tuning_rows[index] for index in chosen]
        self._teacher = data.tuning_teacher[chosen]
        self._batches = by_length([len(row) for row in self._rows], settings.batch_rows)
        self._loss = answer_loss(data, settings)
        self._kept: dict[str, Tensor] = {}
        self.history: list[Evaluation] = []
        self.waited = 0

    @property
    def best(self) -> Evaluation:
        return min(self.history, key=_rank)

    def evaluate(self, step: int, loss: float | None) -> None:
        answers = self._answers()
        shares = exit_shares(self._settings, len(answers))
        changed = [self._changed(values) for values in answers]
        latest = Evaluation(
            step=step,
            loss=loss,
            disagreement=float(np.dot(shares, changed)),
            disagreements=changed,
            distance=float(np.dot(shares, [self._distance(values) for values in answers])),
        )
        better = not self.history or _rank(latest) < _rank(self.best)
        self.history.append(latest)
        self.waited = 0 if better else self.waited + 1
        if better:
            self._kept = {name: weight.detach().clone() for name, weight in _trained(self._student)}

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, weight in _trained(self._student):
                weight.copy_(self._kept[name])

    def _answers(self) -> list[Floats]:
        """float32 [rows, width] of each exit, the final answer last."""
        self._student.eval()
        batches = []
        for chosen in self._batches:
            batch = tensors([self._rows[index] for index in chosen], self._data.tokenizer, self._device)
            with torch.inference_mode(), autocast(self._device, self._settings.bf16):
                batches.append([values.float().cpu().numpy() for values in as_list(self._student(*batch))])
        back = np.argsort(np.concatenate(self._batches))
        return [np.concatenate(values)[back] for values in zip(*batches, strict=True)]

    def _changed(self, values: Floats) -> float:
        return float(disagreements(values, self._teacher, self._data.task, self._data.cosine_floor).mean())

    def _distance(self, values: Floats) -> float:
        if self._data.task.kind is TaskKind.EMBED:
            return float(1.0 - cosine(values, self._teacher).mean())
        return float(self._loss(torch.from_numpy(values), torch.from_numpy(self._teacher)))


def _rank(evaluation: Evaluation) -> tuple[float, float]:
    return evaluation.disagreement, evaluation.distance


def _longest(data: DistillData, settings: DistillSettings) -> int:
    longest = max(len(row) for row in data.rows)
    return min(longest, settings.max_tokens or longest)


def _trained(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in student.named_parameters() if weight.requires_grad)


def _check(student: nn.Module, data: DistillData, settings: DistillSettings) -> None:
    if not data.rows or not data.tuning_rows:
        raise UsageError("distillation needs training rows and tuning rows; give more data")
    pairs = ((data.rows, data.teacher), (data.tuning_rows, data.tuning_teacher))
    if any(values.shape != (len(rows), data.task.width) for rows, values in pairs):
        raise UsageError(f"the teacher's values must be [rows, {data.task.width}], one row for each row of the data")
    if not all(np.isfinite(values).all() for _, values in pairs):
        raise PassError("the teacher answers some rows with values that are not finite; nothing can learn from those")
    if not any(True for _ in _trained(student)):
        raise UsageError(
            "no parameter of the student requires a gradient; call `requires_grad_(True)` on what to train"
        )
    inner = settings.hidden_weight or settings.relation_weight
    if inner and data.scorer is None:
        raise UsageError("losses on hidden states and relations need the teacher itself; give `scorer`", param="scorer")
    if inner and data.scorer is not None and device_of(data.scorer) != device_of(student):
        raise UsageError("student and teacher are on different devices; move the teacher to the student's")
