"""Students of a language model: made smaller round by round, each round followed by distillation.

What `optimize.train` does for encoders. Every round is kept in the cache under a fingerprint of all that it depends on
and within a round the training writes its state down, so a run that is killed goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np
import torch
from pydantic import JsonValue
from transformers import PreTrainedModel

from fettle.answers import Floats
from fettle.errors import ModelError, PassError
from fettle.manifest import PassRecord
from optimize.cache import Cache, Made
from optimize.decoder_anatomy import dissect_decoder
from optimize.decoder_distill import TextDistillData, distill_decoder
from optimize.decoder_examples import Example, Ids, examples_of, prompt_batches
from optimize.decoder_importance import DecoderImportance, decoder_importance
from optimize.decoder_load import DecoderReference, TextScorer, read_decoder
from optimize.decoder_objective import TextDistillSettings
from optimize.decoder_prune import (
    choose_evenly,
    keep_decoder_layers,
    keep_kv_groups,
    keep_neurons,
    neuron_count,
    pool_kv_heads,
)
from optimize.decoder_samples import generated
from optimize.progress import Progress
from optimize.prune import least_influential
from optimize.recipes import Plan, Round
from optimize.train import all_cores, training_step
from optimize.workspace import fingerprint_of

if TYPE_CHECKING:
    from optimize.text_work import TextWork

# Texts that influence and importance are averaged over, and texts of one pass.
EXAMINED_TEXTS, EXAMINED_BATCH = 256, 16
# Of so many training prompts the reference's own answers are learnt from, greedy and drawn; it costs a generation each.
TAUGHT_ROWS: Final = 4000
SAMPLED_ROWS: Final = 1000
TUNING_ROWS: Final = 500
BLOCK_ROWS: Final = 500
SHRINK: Final = "shrink"
SIZES: Final = frozenset({"layers", "neurons", "groups", "pooled"})

Greedy = Callable[[str, Sequence[Ids]], list[Ids]]


@dataclass(frozen=True)
class School:
    """What students are made from, and what they learn from.

    Attributes:
        prompts, right: of the training rows; the data's answers without an end token, None where they have none.
        tuning: prompts that decide which weights are kept.
        max_tokens: of an answer, its end included.
        greedy: from the name of a split and its first prompts to the reference's greedy answers, each with the end
            token where one ended it; None asks the reference itself, in torch.
        fingerprint: over all of these.
    """

    reference: DecoderReference
    cache: Cache
    progress: Progress
    prompts: Sequence[Ids]
    right: Sequence[Ids | None]
    tuning: Sequence[Ids]
    max_tokens: int
    seed: int
    fingerprint: str
    greedy: Greedy | None = None


@dataclass
class TextStudent:
    """A language model in the making: an ordinary checkpoint, by what passes, and by what fingerprint it is known."""

    model: PreTrainedModel
    reference: DecoderReference
    fingerprint: str
    passes: list[PassRecord] = field(default_factory=list)

    @property
    def scorer(self) -> TextScorer:
        return TextScorer(self.model, self.reference.task).eval()


def school_of(work: TextWork, greedy: Greedy | None = None) -> School:
    """What a run of `fettle optimize` has to learn from; the splits `train` and `validation` are there."""
    prompts = [row.ids for row in work.rows("train")]
    said = work.right_answers("train") or [None] * len(prompts)
    answers = work.prompts.encode_answers([answer or "" for answer in said])
    return School(
        reference=work.reference,
        cache=work.cache,
        progress=work.progress,
        prompts=prompts,
        right=[answer if len(answer) else None for answer in answers],
        tuning=[row.ids for row in work.rows("validation")],
        max_tokens=work.max_tokens,
        seed=work.config.seed,
        fingerprint=work.fingerprint_of(
            what="text student", rows=work.fingerprint_of_rows(["train", "validation"]), special=work.prompts.special
        ),
        greedy=greedy,
    )


def make_text_student(school: School, plan: Plan) -> TextStudent:
    """Train a student, or go on from the rounds that are there.

    Raises:
        PassError: a change does not fit the model, or the training failed.
    """
    student = TextStudent(school.reference.language, school.reference, school.fingerprint)
    # Asked for once, and only if a round is yet to be trained.
    lessons = cache(lambda: _Lessons(_examples(school), _tuning(school)))
    for number, change in enumerate(plan.rounds, start=1):
        student = _round(school, plan, number, change, student, lessons)
    return student


@dataclass(frozen=True, slots=True)
class _Lessons:
    examples: list[Example]
    tuning: list[Example]


def _round(
    school: School, plan: Plan, number: int, change: Round, before: TextStudent, lessons: Callable[[], _Lessons]
) -> TextStudent:
    settings = TextDistillSettings(
        epochs=change.epochs, learning_rate=change.learning_rate, tuning_rows=TUNING_ROWS, seed=school.seed
    )
    fingerprint = fingerprint_of(
        before=before.fingerprint,
        change=[change.change, change.parameters],
        settings=settings.model_dump(mode="json"),
        rows=[TAUGHT_ROWS, SAMPLED_ROWS, EXAMINED_TEXTS],
    )
    # Plans may begin alike; the first one trains what they share.
    name, step = f"students/{fingerprint[:12]}", training_step(plan, number)
    made = school.cache.made(name, fingerprint)
    kept = None if made is None else _readable(school, name)
    if made is not None and kept is not None:
        school.progress.skip(step, "already there")
        return TextStudent(kept, school.reference, fingerprint, made.passes)
    taught = lessons()
    notes = school.cache.path(f"{name}-notes")
    with school.progress.step(step) as report, school.cache.making(name) as (folder, finish), all_cores():
        model, records = _smaller(before.model, change, taught.examples, school)
        model.requires_grad_(True)
        pad_id = school.reference.tokenizer.pad_id
        data = TextDistillData(school.reference.language, taught.examples, taught.tuning, pad_id)
        records.append(_distilled(model, data, settings, report, notes))
        student = TextStudent(model.requires_grad_(False), school.reference, fingerprint, [*before.passes, *records])
        model.save_pretrained(folder)
        finish(Made(fingerprint=fingerprint, passes=student.passes))
    shutil.rmtree(notes, ignore_errors=True)
    return student


def _smaller(
    model: PreTrainedModel, change: Round, texts: Sequence[Example], school: School
) -> tuple[PreTrainedModel, list[PassRecord]]:
    """The model after the round's change, with a record of it where there was one."""
    started = time.perf_counter()
    sizes = {name: cast(float, value) for name, value in change.parameters.items()}
    if change.change not in (SHRINK, "none") or not sizes.keys() <= SIZES:
        raise PassError(f"no change of a language model is called {change.change!r} with {', '.join(sizes)}")
    if change.change == "none":
        return model, []
    notes: dict[str, JsonValue] = {}

    def examined() -> DecoderImportance:
        some = texts[:EXAMINED_TEXTS]
        return decoder_importance(model, prompt_batches(some, EXAMINED_BATCH, school.reference.tokenizer.pad_id))

    if "layers" in sizes:
        influence = examined().influence
        dropped = least_influential(influence, len(influence) - int(sizes["layers"]))
        kept = [layer for layer in range(len(influence)) if layer not in dropped]
        model = keep_decoder_layers(model, kept)
        notes["kept"] = list(kept)
    if "neurons" in sizes:
        importance = examined().neurons
        count = neuron_count(len(importance[0]), sizes["neurons"])
        model = keep_neurons(model, choose_evenly(importance, count))
        notes["neurons"] = count
    if "groups" in sizes:
        model = keep_kv_groups(model, choose_evenly(examined().groups, int(sizes["groups"])))
    if "pooled" in sizes:
        model = pool_kv_heads(model, int(sizes["pooled"]))
    anatomy = dissect_decoder(model)
    notes |= {"heads": anatomy.heads, "kv_heads": anatomy.groups, "parameters": model.num_parameters()}
    seconds = round(time.perf_counter() - started, 3)
    # The report knows levers by the beginnings of such names.
    name = "reshape-heads" if sizes.keys() == {"pooled"} else "prune"
    return model, [PassRecord(name=name, parameters=change.parameters, seconds=seconds, notes=notes)]


def _distilled(
    model: PreTrainedModel,
    data: TextDistillData,
    settings: TextDistillSettings,
    report: Callable[[float], None],
    notes: Path,
) -> PassRecord:
    result = distill_decoder(model, data, settings, report, notes)
    return PassRecord(
        name="distill",
        parameters=settings.model_dump(mode="json"),
        seconds=round(result.seconds, 3),
        notes={
            "examples": len(data.examples),
            "steps": result.steps,
            "tokens_per_second": round(result.tokens_per_second, 1),
            "tuning_disagreement": round(result.best.disagreement, 4),
            "disagreement_before": round(result.history[0].disagreement, 4),
            "stopped_early": result.stopped_early,
        },
    )


# What is learnt from.


def _examples(school: School) -> list[Example]:
    """The reference's answers to the first prompts, greedy and drawn, and the data's answers to the others."""
    prompts, end = list(school.prompts), school.reference.end_id
    taught = min(TAUGHT_ROWS, len(prompts))
    found = examples_of(prompts[:taught], _answers(school, "train", prompts[:taught]))
    found += examples_of(prompts[:SAMPLED_ROWS], _answers(school, "train", prompts[:SAMPLED_ROWS], temperature=1.0))
    rest = [(prompts[row], right) for row, right in enumerate(school.right) if row >= taught and right is not None]
    found += examples_of([prompt for prompt, _ in rest], [right for _, right in rest], end)
    limit = school.reference.decoder.context
    return [example for example in found if len(example) <= limit]


def _tuning(school: School) -> list[Example]:
    prompts = list(school.tuning[:TUNING_ROWS])
    return examples_of(prompts, _answers(school, "validation", prompts))


def _answers(school: School, split: str, prompts: Sequence[Ids], temperature: float = 0.0) -> list[Ids]:
    if school.greedy is not None and not temperature:
        return school.greedy(split, prompts)
    found: list[Ids] = []
    blocks = [prompts[first : first + BLOCK_ROWS] for first in range(0, len(prompts), BLOCK_ROWS)]
    with school.progress.step(f"answers of the reference on {split}" + (", drawn" if temperature else "")) as report:
        for number, block in enumerate(blocks):
            found += _block(school, f"{split}-{temperature:g}-{number}", block, temperature)
            report((number + 1) / len(blocks))
    return found


def _block(school: School, name: str, prompts: Sequence[Ids], temperature: float) -> list[Ids]:
    """Answers to some prompts, kept in the cache: one flat array and the lengths."""

    def compute() -> dict[str, Floats]:
        reference = school.reference
        with all_cores():
            answers = generated(
                reference.language,
                prompts,
                end_ids=reference.task.end_ids,
                pad_id=reference.tokenizer.pad_id,
                max_tokens=school.max_tokens,
                temperature=temperature,
                seed=school.seed,
            )
        flat, lengths = np.concatenate(answers), np.array([len(answer) for answer in answers])
        # Ids below 2^24 are exact in float32, which is what the cache keeps.
        return {"ids": flat.astype(np.float32), "lengths": lengths.astype(np.float32)}

    fingerprint = fingerprint_of(of=school.fingerprint, name=name, rows=len(prompts))
    kept = school.cache.arrays(f"taught/{name}", fingerprint, compute)
    lengths = kept["lengths"].astype(np.int64)
    return np.split(kept["ids"].astype(np.int32), lengths.cumsum()[:-1])


def _readable(school: School, name: str) -> PreTrainedModel | None:
    """The model that the cache keeps under a name, or None if its files are damaged."""
    try:
        return read_decoder(school.cache.path(name), torch.float32)
    except ModelError as error:
        school.progress.warn(f"what was kept of {name} is made again: {error.message}")
        return None
