"""Distillation of language models: train a student to give its teacher's next tokens, on data and on its answers.

The teacher runs along, since the logits of a vocabulary are too many to keep. A training that is killed goes on from
where it was last written down, to the same weights bit for bit on the same machine. Making students is the business of
`optimize.decoder_prune`; of what is learnt, `optimize.decoder_objective`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from fettle.errors import UsageError
from fettle.manifest import Strict
from optimize.batches import training_batches
from optimize.decoder_evaluate import Teaching, agreement
from optimize.decoder_examples import Example, example_batch
from optimize.decoder_objective import TextDistillSettings, TextObjective
from optimize.decoder_resume import Notebook, Written
from optimize.objective import device_of
from optimize.training import (
    PLAIN_ATTENTION_TOKENS,
    STEPS_PER_REPORT,
    Report,
    adamw,
    check_loss,
    plain_attention,
    slope,
)


@dataclass(frozen=True, slots=True)
class TextDistillData:
    """What to learn: examples with any answers, and tuning examples whose answers are the teacher's greedy ones.

    `teacher` is on the student's device. The tuning examples decide which weights are kept.
    """

    teacher: PreTrainedModel
    examples: Sequence[Example]
    tuning: Sequence[Example]
    pad_id: int


class TextEvaluation(Strict):
    """The student after `step` steps. `loss`: mean over the training steps since the one before, None before any.

    `disagreement`: share of the tuning examples that greedy decoding answers otherwise than the teacher, to the token;
    `token_disagreement` of their tokens, each after the teacher's; `divergence` of these, the loss without weights.
    """

    step: int
    loss: float | None
    disagreement: float
    token_disagreement: float
    divergence: float


class TextDistillResult(Strict):
    """What the training did. `best` is the evaluation whose weights the student has now."""

    steps: int
    planned_steps: int
    epochs: float
    seconds: float
    tokens_per_second: float = Field(description="of the training, prompts and padding included")
    best: TextEvaluation
    history: list[TextEvaluation]
    stopped_early: bool


def distill_decoder(
    student: PreTrainedModel,
    data: TextDistillData,
    settings: TextDistillSettings,
    report: Report,
    notes: Path | None = None,
) -> TextDistillResult:
    """Train those parameters of the student that require a gradient, in place; keep the best weights seen.

    The weights that it came with count as seen, so training never makes it worse on the tuning examples. On the CPU
    the same seed and number of threads give the same weights; the global random state stays as it is.

    Args:
        notes: a directory where the state is written down from time to time, and taken up if it is there; the caller
            keeps one for each combination of student, data and settings, and deletes it afterwards.

    Raises:
        UsageError: data and settings do not fit together.
        PassError: the loss is no longer a number.
    """
    _check(student, data)
    with ExitStack() as stack:
        device = device_of(student)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(settings.seed)
        if device.type == "cpu" and max(map(len, data.examples)) <= PLAIN_ATTENTION_TOKENS:
            stack.enter_context(plain_attention(student))
            stack.enter_context(plain_attention(data.teacher))
        result = _Training(student, data, settings, notes).run(report)
    student.eval()
    return result


class _Training:
    """One run: the optimizer, what is minimised, the running figures, and the notebook."""

    def __init__(
        self, student: PreTrainedModel, data: TextDistillData, settings: TextDistillSettings, notes: Path | None
    ) -> None:
        self.student, self.data, self.settings = student, data, settings
        self.device = device_of(student)
        self.planned = max(1, round(settings.epochs * len(data.examples) / settings.batch_rows))
        self.objective = TextObjective(student, data.teacher, settings)
        self.trained = dict(_trained(student))
        self.optimizer = adamw(list(self.trained.values()), settings.learning_rate, settings.weight_decay)
        self.share = slope(self.planned, settings.warm_up)
        self.teaching = Teaching(data.teacher, _some(data.tuning, settings), data.pad_id, settings.bf16)
        self.notebook = None if notes is None else Notebook(notes)
        self.best: dict[str, Tensor] = {}
        self.history: list[TextEvaluation] = []
        self.waited, self.steps, self.tokens, self.rows = 0, 0, 0, 0
        self.seconds = 0.0
        self.loss = torch.zeros((), device=self.device)

    def run(self, report: Report) -> TextDistillResult:
        if not self._taken_up():
            self._evaluate(None)
        ends = _ends(self.planned, self.settings.evaluations)
        lengths = [len(example) for example in self.data.examples]
        batches = training_batches(lengths, self.settings.batch_rows, self.settings.seed)
        # What was trained on before comes again, to no purpose but the order of what follows.
        for _ in islice(batches, self.steps):
            pass
        for end in ends:
            first = self.history[-1].step
            if end <= first:
                continue
            if self.waited >= self.settings.patience:
                break
            self._train(islice(batches, end - self.steps), report)
            self._evaluate(float(self.loss) / (end - first))
            self.loss.zero_()
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(self.best[name])
        return self._result()

    def _train(self, batches: Iterator[NDArray[np.int64]], report: Report) -> None:
        mark = time.perf_counter()
        self.student.train()
        for chosen in batches:
            self._step([self.data.examples[index] for index in chosen])
            if self.steps % STEPS_PER_REPORT == 0:
                check_loss(self.loss, self.steps, self.settings.learning_rate)
                report(self.steps / self.planned)
            if self.notebook is not None and self.notebook.due:
                self.seconds, mark = self.seconds + time.perf_counter() - mark, time.perf_counter()
                self._write_down()
        check_loss(self.loss, self.steps, self.settings.learning_rate)
        report(self.steps / self.planned)
        self.seconds += time.perf_counter() - mark

    def _step(self, examples: list[Example]) -> None:
        batch = example_batch(examples, self.data.pad_id, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.share(self.steps)
        loss = self.objective(batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.trained.values(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss += loss.detach()
        self.steps += 1
        self.rows += len(examples)
        self.tokens += batch.ids.numel()

    def _evaluate(self, loss: float | None) -> None:
        self.student.eval()
        found = agreement(self.student, self.teaching)
        latest = TextEvaluation(
            step=self.steps,
            loss=loss,
            disagreement=1.0 - found.texts,
            token_disagreement=1.0 - found.tokens,
            divergence=found.divergence,
        )
        better = not self.history or _rank(latest) < _rank(self._best())
        self.history.append(latest)
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best = {name: weight.detach().clone() for name, weight in self.trained.items()}

    def _best(self) -> TextEvaluation:
        return min(self.history, key=_rank)

    def _result(self) -> TextDistillResult:
        return TextDistillResult(
            steps=self.steps,
            planned_steps=self.planned,
            epochs=self.rows / len(self.data.examples),
            seconds=self.seconds,
            tokens_per_second=self.tokens / max(self.seconds, 1e-9),
            best=self._best(),
            history=self.history,
            stopped_early=self.steps < self.planned,
        )

    # The notebook.

    def _write_down(self) -> None:
        assert self.notebook is not None
        moments = {
            f"{key}.{name}": value
            for name, weight in self.trained.items()
            for key, value in self.optimizer.state[weight].items()
        }
        tensors = {"loss": self.loss, "random": torch.get_rng_state(), **moments}
        tensors |= {f"now.{name}": weight.detach() for name, weight in self.trained.items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}
        figures = {
            "steps": self.steps,
            "rows": self.rows,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "waited": self.waited,
            "history": [entry.model_dump(mode="json") for entry in self.history],
        }
        self.notebook.write(Written(tensors, figures))

    def _taken_up(self) -> bool:
        """Whether there was something to go on from."""
        written = None if self.notebook is None else self.notebook.read()
        if written is None:
            return False
        tensors, figures = written.tensors, written.figures
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(tensors[f"now.{name}"])
                state = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[weight] = {key: _placed(key, value, weight) for key, value in state.items()}
            self.loss.copy_(tensors["loss"])
        torch.set_rng_state(tensors["random"])
        self.best = {name: tensors[f"best.{name}"].to(self.device) for name in self.trained}
        self.history = [TextEvaluation.model_validate(entry) for entry in figures["history"]]
        self.steps, self.rows, self.tokens = figures["steps"], figures["rows"], figures["tokens"]
        self.seconds, self.waited = figures["seconds"], figures["waited"]
        return True


def _placed(key: str, value: Tensor, weight: nn.Parameter) -> Tensor:
    """Moments lie with their weight; so does the fused optimizer's count of steps."""
    return value.to(weight.device, torch.float32 if key == "step" else weight.dtype)


def _rank(evaluation: TextEvaluation) -> tuple[float, float]:
    return evaluation.disagreement, evaluation.divergence


def _ends(planned: int, evaluations: int) -> list[int]:
    return sorted({max(1, round(planned * (count + 1) / evaluations)) for count in range(evaluations)})


def _some(tuning: Sequence[Example], settings: TextDistillSettings) -> list[Example]:
    chosen = np.random.default_rng(settings.seed).permutation(len(tuning))[: settings.tuning_rows]
    return [tuning[index] for index in chosen]


def _trained(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in student.named_parameters() if weight.requires_grad)


def _check(student: PreTrainedModel, data: TextDistillData) -> None:
    if not data.examples or not data.tuning:
        raise UsageError("distillation needs training examples and tuning examples; give more data")
    if not any(True for _ in _trained(student)):
        raise UsageError(
            "no parameter of the student requires a gradient; call `requires_grad_(True)` on what to train"
        )
    widths = [model.get_output_embeddings().weight.shape[0] for model in (student, data.teacher)]
    if widths[0] != widths[1]:
        raise UsageError(
            f"student and teacher have vocabularies of {widths[0]} and {widths[1]} tokens; they must agree"
        )
    if device_of(student) != device_of(data.teacher):
        raise UsageError("student and teacher are on different devices; move the teacher to the student's")
