"""The whole of `fettle optimize`: data and model in, a measured family out.

Every variant is a directory that is complete or absent, its measurements are a second step, and `family.json` comes
last. Each carries a fingerprint of what it depends on, so a run that was killed anywhere is completed by the next
one, which redoes only what is missing or out of date.
"""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson

from fettle import __version__
from fettle.config import OptimizeConfig
from fettle.errors import FamilyError, PassError
from fettle.family import (
    FAMILY_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Family,
    check_files,
    parse_manifest,
    record_files,
    variant_directory,
    write_manifest,
)
from fettle.latency import estimate_ms
from fettle.manifest import (
    SCHEMA_VERSION,
    FamilyManifest,
    Hardware,
    Measurements,
    NotBuilt,
    PassRecord,
    Resources,
    TaskKind,
    VariantEntry,
    VariantManifest,
)
from fettle.rows import Row, Rows
from fettle.store import locked, new_directory, remove_leftovers, sha256_bytes, write_atomic
from fettle.tokenizer import Tokenizer
from optimize import hardware, measure, recipes
from optimize.data import Splits, load_splits
from optimize.labels import Targets, map_labels
from optimize.progress import Progress
from optimize.recipes import Bench, Pass, Recipe

if TYPE_CHECKING:
    from optimize.load import Reference

READ, LOAD, REFERENCE_ANSWERS = "read the data", "load the model", "answers of the reference"
EXPECTED_SECONDS = {READ: 1.0, LOAD: 8.0, REFERENCE_ANSWERS: 15.0}
MEASURE_SECONDS = 45.0
SAMPLE_ROWS = 8
# Other programs at work on this much of the machine make the measured latencies too high.
QUIET = 0.2
# No later step can succeed where one of these stopped an earlier one.
FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def run(config: OptimizeConfig, progress: Progress) -> Family:
    """Make the family, or complete the one that is there.

    Raises:
        BusyError: another run holds the directory.
        DataError, ModelError, UsageError: what was given cannot be used.
        PassError: the reference itself could not be written or measured.
        OSError: the disk is full, or the directory is not writable.
    """
    with locked(config.out), progress:
        remove_leftovers(config.out)
        plan = recipes.chosen(config.recipes)
        progress.plan(_expected(plan))
        with progress.step(READ):
            splits = load_splits(config.files, config.seed)
        for warning in splits.warnings:
            progress.warn(warning)
        with progress.step(LOAD):
            from optimize.load import load_reference

            reference = load_reference(config.model, task=config.task)
        for note in reference.notes.values():
            progress.warn(str(note))
        write_tokenizer(config.out, reference)
        work = Work(config, progress, reference, splits)
        built = work.build_all(plan)
        measured = work.measure_all(built)
        return work.write_family(measured)


@dataclass
class Work:
    """One run's inputs, and what is made from them when it is first needed."""

    config: OptimizeConfig
    progress: Progress
    reference: Reference
    splits: Splits

    def __post_init__(self) -> None:
        wanted = self.config.recipes
        self.not_built = [item for item in recipes.unavailable() if wanted is None or item.id in wanted]

    @cached_property
    def hardware(self) -> Hardware:
        return hardware.describe()

    @cached_property
    def chosen_rows(self) -> list[int]:
        """Rows of `test` that quality is measured on, in an order that mixes what a sorted file keeps apart."""
        order = np.random.default_rng(self.config.seed).permutation(len(self.splits["test"]))
        return [int(row) for row in order[: self.config.max_rows]]

    @cached_property
    def rows(self) -> list[Row]:
        tokenizer = Tokenizer(self.config.out / TOKENIZER_FILE, self.reference.tokenizer)
        texts = self.splits["test"].texts
        return tokenizer.encode([texts[row] for row in self.chosen_rows])

    @cached_property
    def sample(self) -> Rows:
        return Rows.of(self.rows[:SAMPLE_ROWS])

    @cached_property
    def targets(self) -> Targets | None:
        labels = self.splits["test"].labels
        if labels is None or self.reference.task.kind is TaskKind.EMBED:
            return None
        targets = map_labels([labels[row] for row in self.chosen_rows], self.reference.task)
        if targets.warning:
            self.progress.warn(targets.warning)
        return targets

    @cached_property
    def exam(self) -> measure.Exam:
        with self.progress.step(REFERENCE_ANSWERS) as report:
            answers = measure.reference_values(self.reference, self.rows, report)
        busy = hardware.busy_share()
        if busy > QUIET:
            self.progress.warn(
                f"other programs keep {busy:.0%} of the processors busy, so the latencies will come out too high; "
                "repeat with --remeasure when the machine is quiet"
            )
        return measure.Exam(self.reference.task, self.rows, answers, self.targets, self.config.threads, self.hardware)

    # Building.

    def build_all(self, plan: list[Recipe]) -> list[VariantManifest]:
        built: dict[str, VariantManifest] = {}
        for recipe in plan:
            if recipe.parent is not None and recipe.parent not in built:
                self._give_up(recipe.id, _build_step(recipe.id), f"{recipe.parent}, which it is made from, failed")
                continue
            parent = built.get(recipe.parent or "")
            try:
                built[recipe.id] = self.build(recipe, parent)
            except PassError as error:
                if recipe.parent is None:
                    raise
                self._give_up(recipe.id, _build_step(recipe.id), error.message)
        return list(built.values())

    def build(self, recipe: Recipe, parent: VariantManifest | None) -> VariantManifest:
        """Make one variant, or take over the one that is there.

        Raises:
            PassError: one of its passes failed.
        """
        step = _build_step(recipe.id)
        fingerprint = self._build_fingerprint(recipe, parent)
        found = existing(variant_directory(self.config.out, recipe.id), fingerprint)
        if found is not None:
            self.progress.skip(step, "already there")
            return found
        with self.progress.step(step) as report, new_directory(variant_directory(self.config.out, recipe.id)) as new:
            bench = Bench(
                reference=self.reference,
                directory=new,
                parent=None if parent is None else variant_directory(self.config.out, parent.id),
                sample=self.sample,
            )
            records = []
            for index, item in enumerate(recipe.passes):
                records.append(apply(item, bench))
                report((index + 1) / len(recipe.passes))
            manifest = VariantManifest(
                id=recipe.id,
                parent=recipe.parent,
                runtime=recipe.runtime,
                precision=recipe.precision,
                recipe=records,
                tokenizer=self.reference.tokenizer,
                task=self.reference.task,
                files=record_files(new),
                fingerprint=fingerprint,
                resources=Resources(cpus=self.config.threads),
            )
            # Last: a directory with a manifest is complete.
            write_manifest(new / MANIFEST_FILE, manifest)
        return manifest

    def _build_fingerprint(self, recipe: Recipe, parent: VariantManifest | None) -> str:
        return fingerprint_of(
            fettle=__version__,
            schema=SCHEMA_VERSION,
            source=self.reference.source.sha256,
            task=self.reference.task.model_dump(mode="json"),
            recipe=[recipe.id, [[step.name, step.parameters] for step in recipe.passes]],
            parent=parent.fingerprint if parent else None,
            libraries=self.hardware.versions,
        )

    # Measuring.

    def measure_all(self, built: list[VariantManifest]) -> dict[str, tuple[VariantManifest, str]]:
        """The measured variants by id, each with the SHA-256 of its manifest file."""
        measured = {}
        for manifest in built:
            try:
                measured[manifest.id] = self.measure(manifest)
            except PassError as error:
                if manifest.parent is None:
                    raise
                self._give_up(manifest.id, _measure_step(manifest.id), f"measuring failed: {error.message}")
        return measured

    def measure(self, manifest: VariantManifest) -> tuple[VariantManifest, str]:
        step = _measure_step(manifest.id)
        directory = variant_directory(self.config.out, manifest.id)
        fingerprint = self._measure_fingerprint(manifest)
        done = manifest.measured is not None and manifest.measured.fingerprint == fingerprint
        if done and not self.config.remeasure:
            self.progress.skip(step, "already done")
            return manifest, sha256_bytes((directory / MANIFEST_FILE).read_bytes())
        exam = self.exam
        with self.progress.step(step) as report:
            found = measure.measure(directory, exam, fingerprint, report)
        resources = Resources(cpus=self.config.threads, memory_bytes=found.peak_memory_bytes)
        manifest = manifest.model_copy(update={"measured": found, "resources": resources})
        return manifest, write_manifest(directory / MANIFEST_FILE, manifest)

    def _measure_fingerprint(self, manifest: VariantManifest) -> str:
        return fingerprint_of(
            variant=manifest.fingerprint,
            test=self.splits["test"].sha256,
            max_rows=self.config.max_rows,
            seed=self.config.seed,
            threads=self.config.threads,
            hardware=self.hardware.model_dump(mode="json"),
        )

    # The family.

    def write_family(self, measured: dict[str, tuple[VariantManifest, str]]) -> Family:
        """Last step: `family.json` names every manifest by its hash, so it is written when all of them are final."""
        variants = [manifest for manifest, _ in measured.values()]
        tokenizer = self.config.out / TOKENIZER_FILE
        manifest = FamilyManifest(
            fettle_version=__version__,
            name=self.config.name or default_name(self.config.model),
            source=self.reference.source,
            task=self.reference.task,
            tokenizer=self.reference.tokenizer,
            tokenizer_files=[
                record.model_copy(update={"path": f"{tokenizer.parent.name}/{record.path}"})
                for record in record_files(tokenizer.parent)
            ],
            reference=recipes.REFERENCE,
            default=default_variant(variants, recipes.REFERENCE),
            data={name: split.record() for name, split in self.splits.by_name.items()},
            hardware=self.hardware,
            variants=[VariantEntry(id=name, manifest_sha256=digest) for name, (_, digest) in measured.items()],
            not_built=self.not_built,
        )
        write_manifest(self.config.out / FAMILY_FILE, manifest)
        return Family.open(self.config.out)

    def _give_up(self, name: str, step: str, reason: str) -> None:
        self.not_built.append(NotBuilt(id=name, reason=reason))
        self.progress.fail(step, reason)


def apply(step: Pass, bench: Bench) -> PassRecord:
    """Run one pass and record it.

    Raises:
        PassError: it failed, for whatever reason that does not concern the whole run.
    """
    started = time.perf_counter()
    try:
        notes = step.apply(bench)
    except PassError:
        raise
    except OSError as error:
        if error.errno in FATAL:
            raise
        raise PassError(f"{step.name}: {_first_line(error)}") from error
    except Exception as error:
        # Exporters and quantizers raise anything at all, and one variant less is no reason to lose the others.
        raise PassError(f"{step.name}: {_first_line(error)}") from error
    return PassRecord(
        name=step.name, parameters=step.parameters, seconds=round(time.perf_counter() - started, 3), notes=notes
    )


def existing(directory: Path, fingerprint: str) -> VariantManifest | None:
    """The variant in `directory` if it was made from the same things and is intact."""
    try:
        manifest = parse_manifest(directory / MANIFEST_FILE, VariantManifest)
    except FamilyError:
        return None
    if manifest.fingerprint != fingerprint or check_files(directory, manifest.files):
        return None
    return manifest


def write_tokenizer(out: Path, reference: Reference) -> None:
    path = out / TOKENIZER_FILE
    path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_bytes() != reference.tokenizer_json:
        write_atomic(path, reference.tokenizer_json)


def default_variant(variants: list[VariantManifest], reference: str) -> str:
    """The fastest at one typical row among those that answered every row as the reference did, in any batch."""
    speeds = {}
    for variant in variants:
        found = variant.measured
        if found is not None and (variant.id == reference or _exact(found)):
            speeds[variant.id] = estimate_ms(found.latency, 1, found.typical_length)
    return min(speeds, key=speeds.__getitem__, default=reference)


def _exact(found: Measurements) -> bool:
    return found.quality.disagreement == 0 and found.batching.invariant


def default_name(model: str) -> str:
    """The model's last path part, with what a name may not hold replaced by dashes."""
    last = Path(model).resolve().name if Path(model).is_dir() else model.rstrip("/").rpartition("/")[2]
    cleaned = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in last)
    return cleaned.lstrip("._-")[:64] or "model"


def fingerprint_of(**parts: object) -> str:
    """Hex SHA-256 over named values, each of which is plain JSON."""
    return sha256_bytes(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))


def _expected(plan: list[Recipe]) -> dict[str, float]:
    building = {_build_step(recipe.id): recipe.expected_seconds for recipe in plan}
    measuring = {_measure_step(recipe.id): MEASURE_SECONDS for recipe in plan}
    return {**EXPECTED_SECONDS, **building, **measuring}


def _build_step(name: str) -> str:
    return f"build {name}"


def _measure_step(name: str) -> str:
    return f"measure {name}"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
