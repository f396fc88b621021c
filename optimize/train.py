"""Students: the reference changed in shape round by round, each round followed by distillation, then exit heads.

Every round is kept in the cache under a fingerprint of all that it depends on, so a run that is killed in one redoes
that one alone.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fettle.errors import FettleError, PassError
from fettle.machine import usable_cores
from fettle.manifest import Analysis, PassRecord
from optimize import importance, prune, reshape
from optimize.anatomy import dissect
from optimize.batches import by_length, tensors
from optimize.cache import Made
from optimize.distill import DistillData, DistillSettings, distill
from optimize.exits import (
    LAYERS_FILE,
    Heads,
    HeadSettings,
    Lesson,
    MultiExit,
    load_heads,
    save_heads,
    train_frozen_heads,
)
from optimize.load import Reference
from optimize.recipes import Plan, Round
from optimize.student import (
    SHAPE,
    FactorizeEmbeddings,
    KeepLayers,
    Operation,
    PruneHeads,
    PruneNeurons,
    Shape,
    ShareLayers,
    ShrinkWidth,
    apply,
    load_student,
    parameters,
    save_student,
)
from optimize.workspace import Work, fingerprint_of
from workers.torch_encoder import Scorer

# Rows that importance and influence are averaged over, and rows of one pass.
EXAMINED_ROWS, EXAMINED_BATCH = 512, 32
DECILES = 10
Kept = TypeVar("Kept")

ANALYSIS = "importance of layers, heads and neurons"
# A guess until real times are known: a small encoder on two cores.
TRAINED_PER_SECOND, READ_PER_SECOND = 80.0, 200.0
PASS_NAMES = {
    "drop-layers": "prune-layers",
    "alternate-layers": "keep-alternate-layers",
    "prune": "prune-heads-and-neurons",
    "share": "share-layers",
    "factorize": "factorize-embeddings",
    "width": "shrink-width",
}


@dataclass
class Student:
    """A model in the making: what was done to the reference, how, and by what fingerprint it is known.

    `heads` are there as soon as exits were trained.
    """

    scorer: Scorer
    fingerprint: str
    operations: list[Operation] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    heads: Heads | None = None

    @property
    def multi_exit(self) -> MultiExit | None:
        return None if self.heads is None else MultiExit(self.scorer, self.heads).eval()


def analyse(work: Work) -> Analysis:
    """What each part of the reference contributes, for the report; kept in the cache."""
    fingerprint = work.fingerprint_of(what="analysis", train=work.splits["train"].sha256, rows=EXAMINED_ROWS)
    name = "analysis"
    made = work.cache.made(name, fingerprint)
    if made is not None:
        work.progress.skip(ANALYSIS, "already there")
        return Analysis.model_validate(made.facts)
    with work.progress.step(ANALYSIS) as report, work.cache.making(name) as (_, finish), all_cores():
        scorer = work.reference.model
        influence = importance.layer_influence(scorer, examined(work))
        report(0.3)
        heads, neurons = _importance(scorer, work)
        found = Analysis(
            layer_influence=influence,
            head_importance=_relative([row.tolist() for row in heads]),
            neuron_importance=_relative([_deciles(row) for row in neurons]),
        )
        finish(Made(fingerprint=fingerprint, facts=found.model_dump(mode="json")))
    return found


def make_student(work: Work, plan: Plan) -> Student:
    """Train a student, or go on from the rounds that are there.

    Raises:
        PassError: a change does not fit the model, or the training failed.
    """
    splits = {name: [work.splits[name].sha256, len(work.rows(name))] for name in ("train", "validation")}
    student = Student(work.reference.model, work.fingerprint_of(what="student", splits=splits))
    for number, change in enumerate(plan.rounds, start=1):
        if plan.exits and number == len(plan.rounds):
            # The last round trains the exits along, so they have to be there.
            student = _heads(work, plan, student)
        student = _round(work, plan, number, change, student)
    return _heads(work, plan, student) if plan.exits and student.heads is None else student


def training_step(plan: Plan, number: int) -> str:
    return f"train {plan.id}" + (f", round {number} of {len(plan.rounds)}" if len(plan.rounds) > 1 else "")


def heads_step(plan: Plan) -> str:
    return f"train exit heads of {plan.id}"


def step_seconds(plan: Plan, rows: int) -> dict[str, float]:
    """The steps of making a student of `rows` rows, with a first guess of their seconds."""
    steps = {heads_step(plan): rows / READ_PER_SECOND} if plan.exits else {}
    for number, change in enumerate(plan.rounds, start=1):
        steps[training_step(plan, number)] = change.epochs * rows / TRAINED_PER_SECOND
    return steps


def _round(work: Work, plan: Plan, number: int, change: Round, before: Student) -> Student:
    settings = DistillSettings(
        epochs=change.epochs,
        learning_rate=change.learning_rate,
        temperature=1.0,
        seed=work.config.seed,
        hidden_weight=change.hidden_weight,
        relation_weight=change.relation_weight,
    )
    fingerprint = fingerprint_of(
        before=before.fingerprint,
        change=[change.change, change.parameters],
        settings=settings.model_dump(mode="json"),
        exits=list(plan.exits) if before.heads else [],
    )
    # Plans may begin alike; the first one trains what they share.
    name, step = f"students/{fingerprint[:12]}", training_step(plan, number)
    made = work.cache.made(name, fingerprint)
    kept = None if made is None else _readable(work, name, lambda folder: _loaded(work, folder, made))
    if kept is not None:
        work.progress.skip(step, "already there")
        return kept
    with work.progress.step(step) as report, work.cache.making(name) as (folder, finish), all_cores():
        scorer, operations, records = _changed(copy.deepcopy(before.scorer), change, work)
        student = Student(scorer, fingerprint, [*before.operations, *operations], heads=before.heads)
        trained: nn.Module = student.multi_exit or scorer
        records.append(_distilled(trained, settings, work, report))
        student.passes = [*before.passes, *records]
        trained.eval().requires_grad_(False)
        _save(student, work.reference, folder)
        finish(Made(fingerprint=fingerprint, passes=student.passes))
    return student


def _heads(work: Work, plan: Plan, before: Student) -> Student:
    settings = HeadSettings(seed=work.config.seed)
    fingerprint = fingerprint_of(before=before.fingerprint, exits=list(plan.exits), what="heads")
    name, step = f"students/heads-{fingerprint[:12]}", heads_step(plan)
    made = work.cache.made(name, fingerprint)
    heads = None if made is None else _readable(work, name, load_heads)
    if made is not None and heads is not None:
        work.progress.skip(step, "already there")
    else:
        with work.progress.step(step) as report, work.cache.making(name) as (folder, finish), all_cores():
            started = time.perf_counter()
            train = Lesson(work.rows("train"), work.answers("train"))
            tuning = Lesson(work.rows("validation"), work.answers("validation"))
            spec = work.reference.tokenizer
            heads = train_frozen_heads(before.scorer, plan.exits, train, tuning, spec, settings, report)
            save_heads(heads, folder)
            changed: dict[str, JsonValue] = {str(layer): round(share, 4) for layer, share in heads.disagreement.items()}
            record = PassRecord(
                name="exit-heads",
                parameters={"layers": list(plan.exits), "epochs": settings.epochs, "seed": settings.seed},
                seconds=round(time.perf_counter() - started, 3),
                notes={"tuning_disagreement": changed, "first_token": heads.first_token},
            )
            made = Made(fingerprint=fingerprint, passes=[*before.passes, record])
            finish(made)
    return replace(before, heads=heads, fingerprint=fingerprint, passes=made.passes)


def _distilled(
    student: nn.Module, settings: DistillSettings, work: Work, report: Callable[[float], None]
) -> PassRecord:
    student.requires_grad_(True)
    tuning = work.rows("validation")
    data = DistillData(
        rows=work.rows("train"),
        teacher=work.answers("train"),
        tuning_rows=tuning,
        tuning_teacher=work.answers("validation"),
        task=work.reference.task,
        tokenizer=work.reference.tokenizer,
        scorer=work.reference.model if settings.hidden_weight or settings.relation_weight else None,
        cosine_floor=work.config.cosine_floor,
    )
    result = distill(student, data, settings, report)
    return PassRecord(
        name="distill",
        parameters=settings.model_dump(mode="json"),
        seconds=round(result.seconds, 3),
        notes={
            "steps": result.steps,
            "rows_per_second": round(result.rows_per_second, 1),
            "tuning_disagreements": [round(share, 4) for share in result.best.disagreements],
            "disagreement_before": round(result.history[0].disagreement, 4),
            "stopped_early": result.stopped_early,
        },
    )


def _changed(scorer: Scorer, change: Round, work: Work) -> tuple[Scorer, list[Operation], list[PassRecord]]:
    """The scorer after the round's change, the operations that did it, and a record where there was one."""
    started = time.perf_counter()
    operations, notes = _operations(scorer, change, work)
    for operation in operations:
        scorer = apply(scorer, operation)
    if not operations:
        return scorer, [], []
    record = PassRecord(
        name=PASS_NAMES[change.change],
        parameters=change.parameters,
        seconds=round(time.perf_counter() - started, 3),
        notes={**notes, "parameters": parameters(scorer)},
    )
    return scorer, operations, [record]


def _operations(scorer: Scorer, change: Round, work: Work) -> tuple[list[Operation], dict[str, JsonValue]]:
    anatomy = dissect(scorer)
    layers = len(anatomy.layers)
    match change.change:
        case "none":
            return [], {}
        case "drop-layers":
            influence = importance.layer_influence(scorer, examined(work))
            dropped = prune.least_influential(influence, _whole(change, "count"))
            kept = [layer for layer in range(layers) if layer not in dropped]
            return [KeepLayers(layers=kept)], {"kept": list(kept)}
        case "alternate-layers":
            kept = reshape.alternate_layers(layers, _whole(change, "count"))
            return [KeepLayers(layers=kept)], {"kept": list(kept)}
        case "prune":
            share = _number(change, "keep_share")
            heads, neurons = _importance(scorer, work)
            kept_heads, kept_neurons = prune.choose_heads(heads, share), prune.choose_neurons(neurons, share)
            notes: dict[str, JsonValue] = {
                "heads": [len(kept) for kept in kept_heads],
                "neurons": [len(kept) for kept in kept_neurons],
            }
            return [PruneHeads(keep=kept_heads), PruneNeurons(keep=kept_neurons)], notes
        case "share":
            return [ShareLayers(source=layers // 2)], {"layers": layers}
        case "factorize":
            rank = min(_whole(change, "rank"), anatomy.hidden // 2)
            return [FactorizeEmbeddings(rank=rank)], {"rank": rank}
        case "width":
            size = anatomy.layers[0].head_size
            hidden = max(1, round(anatomy.hidden * _number(change, "share") / size)) * size
            return [ShrinkWidth(hidden=hidden)], {"hidden": hidden}
    raise PassError(f"no change of shape is called {change.change!r}")


def examined(work: Work) -> Iterator[tuple[Tensor, ...]]:
    """Batches of training rows that influence and importance are averaged over."""
    rows = work.rows("train")[:EXAMINED_ROWS]
    for chosen in by_length([len(row) for row in rows], EXAMINED_BATCH):
        yield tensors([rows[index] for index in chosen], work.reference.tokenizer, torch.device("cpu"))


@torch.enable_grad()
def _importance(scorer: Scorer, work: Work) -> tuple[list[Tensor], list[Tensor]]:
    loss = importance.own_answer_loss(work.reference.task, work.config.seed)
    return importance.head_and_neuron_importance(scorer, examined(work), loss)


@contextmanager
def all_cores() -> Iterator[None]:
    """Torch on every usable core while a student is trained; the setting before comes back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _save(student: Student, reference: Reference, folder: Path) -> None:
    save_student(student.scorer, student.operations, folder, reference.config)
    if student.heads is not None:
        save_heads(student.heads, folder)


def _readable(work: Work, name: str, read: Callable[[Path], Kept]) -> Kept | None:
    """What the cache keeps under a name, or None if its files are damaged."""
    try:
        return read(work.cache.path(name))
    except FettleError as error:
        work.progress.warn(f"what was kept of {name} is made again: {error.message}")
        return None


def _loaded(work: Work, folder: Path, made: Made) -> Student:
    scorer = load_student(folder, work.reference.task)
    operations = Shape.model_validate_json((folder / SHAPE).read_bytes()).operations
    heads = load_heads(folder) if (folder / LAYERS_FILE).exists() else None
    return Student(scorer, made.fingerprint, list(operations), made.passes, heads)


def _whole(change: Round, name: str) -> int:
    return int(_number(change, name))


def _number(change: Round, name: str) -> float:
    value = change.parameters[name]
    assert isinstance(value, int | float)
    return float(value)


def _deciles(neurons: Tensor) -> list[float]:
    """Mean importance of the most important tenth, the next one, and so on."""
    ranked = np.sort(neurons.double().numpy())[::-1]
    return [float(part.mean()) for part in np.array_split(ranked, min(DECILES, len(ranked)))]


def _relative(rows: list[list[float]]) -> list[list[float]]:
    largest = max((value for row in rows for value in row), default=0.0)
    if not largest or not math.isfinite(largest):
        return [[0.0] * len(row) for row in rows]
    return [[value / largest for value in row] for row in rows]
