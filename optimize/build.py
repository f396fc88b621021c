"""Variants as directories: built by their recipes' passes, measured, and taken over where they are there already.

A directory with a manifest is complete. What fails is one variant less, and the reason is kept.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from fettle.errors import FamilyError, PassError, first_line
from fettle.family import (
    MANIFEST_FILE,
    check_files,
    parse_manifest,
    record_files,
    variant_directory,
    write_manifest,
)
from fettle.manifest import Measurements, NotBuilt, PassRecord, Resources, VariantManifest
from fettle.store import new_directory
from optimize import measure, train
from optimize.recipes import Bench, Pass, Plan, Recipe
from optimize.train import Student
from optimize.workspace import Work, fingerprint_of

if TYPE_CHECKING:
    from optimize.load import Reference

# The original in torch takes several times as long as anything made from it.
MEASURE_SECONDS, MEASURE_REFERENCE_SECONDS = 25.0, 100.0
# No later step can succeed where one of these stopped an earlier one.
FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Taught(Protocol):
    """A student: its model as a scorer, what it was made from, and by which passes."""

    @property
    def scorer(self) -> Any: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def passes(self) -> list[PassRecord]: ...


@dataclass
class Builder:
    """Makes variants one by one; `built` are complete and measured, `not_built` are those that failed, with reasons."""

    work: Work
    built: dict[str, VariantManifest] = field(default_factory=dict)
    not_built: list[NotBuilt] = field(default_factory=list)

    def make(self, recipe: Recipe) -> VariantManifest | None:
        """Build and measure one variant; None if that failed.

        Raises:
            PassError: the reference itself could not be built or measured.
        """
        step = build_step(recipe.id)
        try:
            if recipe.parent is not None and recipe.parent not in self.built:
                raise PassError(f"{recipe.parent}, which it is made from, failed")
            manifest = self._build(recipe)
            step = measure_step(recipe.id)
            self.built[recipe.id] = self._measure(manifest)
        except PassError as error:
            if recipe.parent is None:
                raise
            measuring = step == measure_step(recipe.id)
            self.give_up(recipe.id, f"measuring failed: {error.message}" if measuring else error.message, step)
            return None
        return self.built[recipe.id]

    def give_up(self, name: str, reason: str, step: str) -> None:
        self.not_built.append(NotBuilt(id=name, reason=reason))
        self.work.progress.fail(step, reason)

    def _build(self, recipe: Recipe) -> VariantManifest:
        work = self.work
        step, directory = build_step(recipe.id), variant_directory(work.config.out, recipe.id)
        parent = self.built.get(recipe.parent or "")
        student = self._student(recipe)
        fingerprint = self._fingerprint(recipe, parent, student)
        found = existing(work, recipe.id, fingerprint)
        if found is not None:
            work.progress.skip(step, "already there")
            return found
        with work.progress.step(step) as report, new_directory(directory) as new:
            bench = Bench(
                reference=work.reference if student is None else self.taught(student),
                directory=new,
                parent=None if parent is None else variant_directory(work.config.out, parent.id),
                sample=work.sample,
                calibration=lambda: work.calibration_rows,
                multi_exit=student.multi_exit if isinstance(student, Student) else None,
            )
            records = [] if student is None else list(student.passes)
            for index, item in enumerate(recipe.passes):
                records.append(apply(item, bench))
                report((index + 1) / len(recipe.passes))
            manifest = VariantManifest(
                id=recipe.id,
                parent=recipe.parent,
                runtime=recipe.runtime,
                precision=recipe.precision,
                recipe=records,
                tokenizer=work.reference.tokenizer,
                task=work.reference.task,
                files=record_files(new),
                stages=bench.stages,
                decoder=bench.reference.decoder,
                row_by_row=recipe.row_by_row,
                packed=bench.packed,
                fingerprint=fingerprint,
                resources=Resources(cpus=work.config.threads),
            )
            # Last: a directory with a manifest is complete.
            write_manifest(new / MANIFEST_FILE, manifest)
        return manifest

    # What is different for text: `optimize.text_build`.

    def teach(self, plan: Plan) -> Taught:
        """A student made as the plan says."""
        return train.make_student(self.work, plan)

    def taught(self, student: Taught) -> Reference:
        """The reference with the student in its place."""
        return replace(self.work.reference, model=student.scorer)

    def recipe_parts(self) -> dict[str, object]:
        """What a variant depends on beside its recipe and the model; plain JSON."""
        return {}

    def exam_parts(self) -> dict[str, object]:
        """What measurements depend on beside the variant and the machine; plain JSON."""
        work = self.work
        return {
            "splits": {name: work.splits[name].sha256 for name in ("test", "validation") if work.has(name)},
            "max_rows": work.config.max_rows,
            "cosine_floor": work.config.cosine_floor,
        }

    def measured(self, manifest: VariantManifest, fingerprint: str, report: measure.Report) -> Measurements:
        """Try the variant on what the run has of rows."""
        # The search has nothing to learn from how the reference answers its own tuning rows.
        exam = self.work.exam if manifest.parent is not None else replace(self.work.exam, tuning_rows=[])
        return measure.measure(variant_directory(self.work.config.out, manifest.id), exam, fingerprint, report)

    # Steps.

    def _student(self, recipe: Recipe) -> Taught | None:
        if recipe.plan is None:
            return None
        missing = [name for name in recipe.needs if not self.work.has(name)]
        if missing:
            raise PassError(f"the data have no {missing[0]} split, which training needs; give --{missing[0]} or --data")
        with contained(f"train {recipe.plan.id}"):
            return self.teach(recipe.plan)

    def _fingerprint(self, recipe: Recipe, parent: VariantManifest | None, student: Taught | None) -> str:
        return self.work.fingerprint_of(
            recipe=[recipe.id, [[step.name, step.parameters] for step in recipe.passes]],
            parent=parent.fingerprint if parent else None,
            student=student.fingerprint if student else None,
            **self.recipe_parts(),
        )

    def _measure(self, manifest: VariantManifest) -> VariantManifest:
        work = self.work
        step, directory = measure_step(manifest.id), variant_directory(work.config.out, manifest.id)
        fingerprint = fingerprint_of(
            variant=manifest.fingerprint,
            seed=work.config.seed,
            threads=work.config.threads,
            **self.exam_parts(),
            hardware=work.hardware.model_dump(mode="json"),
        )
        done = manifest.measured is not None and manifest.measured.fingerprint == fingerprint
        if done and not work.config.remeasure:
            work.progress.skip(step, "already done")
            return manifest
        with work.progress.step(step) as report:
            found = self.measured(manifest, fingerprint, report)
        resources = Resources(cpus=work.config.threads, memory_bytes=found.peak_memory_bytes)
        manifest = manifest.model_copy(update={"measured": found, "resources": resources})
        write_manifest(directory / MANIFEST_FILE, manifest)
        return manifest


@contextmanager
def contained(name: str) -> Iterator[None]:
    """What goes wrong inside costs one variant: it becomes a PassError, unless it concerns the whole run."""
    try:
        yield
    except Exception as error:
        fatal = _fatal(error)
        if fatal is not None:
            raise fatal from None
        if isinstance(error, PassError):
            raise
        # Exporters, quantizers and models raise anything at all, and one variant less is no reason to lose the others.
        raise PassError(f"{name}: {_cut_line(error)}") from error


def apply(step: Pass, bench: Bench) -> PassRecord:
    """Run one pass and record it.

    Raises:
        PassError: it failed, for whatever reason that does not concern the whole run.
    """
    started = time.perf_counter()
    with contained(step.name):
        notes = step.apply(bench)
    return PassRecord(
        name=step.name, parameters=step.parameters, seconds=round(time.perf_counter() - started, 3), notes=notes
    )


def existing(work: Work, name: str, fingerprint: str) -> VariantManifest | None:
    """The variant if it was made from the same things and is intact."""
    directory = variant_directory(work.config.out, name)
    try:
        manifest = parse_manifest(directory / MANIFEST_FILE, VariantManifest)
    except FamilyError:
        return None
    if manifest.fingerprint != fingerprint or check_files(directory, manifest.files):
        return None
    return manifest


def build_step(name: str) -> str:
    return f"build {name}"


def measure_step(name: str) -> str:
    return f"measure {name}"


def _fatal(error: BaseException | None) -> OSError | None:
    """The full disk or the like behind an error, whatever it was wrapped in."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FATAL:
            return error
        error = error.__cause__
    return None


def _cut_line(error: Exception) -> str:
    return first_line(error)[:300]
