"""The whole of `fettle optimize`: data and model in, a measured and certified family out.

Every variant is a directory that is complete or absent, its measurements are a second step, and `family.json` comes
last. Each thing carries a fingerprint of what it depends on, so a run that was killed anywhere is completed by the
next one, which redoes only what is missing or out of date.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fettle.config import OptimizeConfig
from fettle.errors import PassError, UsageError
from fettle.family import MANIFEST_FILE, TOKENIZER_FILE, Family, variant_directory
from fettle.manifest import Analysis, NotBuilt, TaskKind
from fettle.store import locked, remove_leftovers, write_atomic
from optimize import finish, recipes, search, train
from optimize.build import (
    FATAL,
    MEASURE_REFERENCE_SECONDS,
    MEASURE_SECONDS,
    Builder,
    build_step,
    contained,
    measure_step,
)
from optimize.data import load_splits
from optimize.load import Reference, load_reference, task_kind
from optimize.progress import Progress
from optimize.recipes import Recipe
from optimize.report import write_report
from optimize.search import Facts, State, Tried
from optimize.workspace import Work, answers_step

READ, LOAD = "read the data", "load the model"
EXPECTED_SECONDS = {READ: 1.0, LOAD: 8.0}
ANSWERED_PER_SECOND, CERTIFYING_SECONDS = 100.0, 60.0


def run(config: OptimizeConfig, progress: Progress) -> Family:
    """Make the family, or complete the one that is there.

    Raises:
        BusyError: another run holds the directory.
        DataError, ModelError, UsageError: what was given cannot be used.
        PassError: the reference itself could not be written or measured.
        OSError: the disk is full, or the directory is not writable.
    """
    started = time.monotonic()
    with locked(config.out), progress, naming(config.out):
        remove_leftovers(config.out)
        finish.restore_dropped(config.out)
        progress.plan(EXPECTED_SECONDS)
        if task_kind(config.model, config.task) is TaskKind.GENERATE:
            # A circle otherwise.
            from optimize.text_pipeline import run_texts

            return run_texts(config, progress, lambda: time.monotonic() - started)
        _check_no_text_options(config)
        with progress.step(READ):
            splits = load_splits(config.files, config.seed)
        for warning in splits.warnings:
            progress.warn(warning)
        reference = load(config, progress)
        write_tokenizer(config, reference)
        work = Work(config, progress, reference, splits)
        builder = Builder(work)
        missing = recipes.unavailable()
        outlook = Outlook(lambda recipe: seconds_of(work, recipe), seconds_beside(work), missing)
        notes = Search(work, builder, lambda: time.monotonic() - started, outlook).run()
        analysis = _analysis(work, builder, notes)
        findings = finish.find_points(work, builder.built, analysis)
        not_built = [*wanted_of(config, missing), *builder.not_built]
        family = finish.write_family(work, builder.built, not_built, findings)
        write_report(family)
        return family


def load(config: OptimizeConfig, progress: Progress) -> Reference:
    """The model that was given, with what was assumed about it said."""
    with progress.step(LOAD):
        reference = load_reference(config.model, task=config.task)
    for note in reference.notes.values():
        progress.warn(str(note))
    return reference


@contextmanager
def naming(directory: Path) -> Iterator[None]:
    """A full disk or the like that does not say where it is names the directory."""
    try:
        yield
    except OSError as error:
        if error.errno in FATAL and error.filename is None:
            error.filename = str(directory)
        raise


@dataclass(frozen=True, slots=True)
class Outlook:
    """First guesses of how long steps take, which real times correct as the run goes on; and what cannot be built.

    `seconds`: a recipe's steps; `beside`: those that belong to none.
    """

    seconds: Callable[[Recipe], dict[str, float]]
    beside: dict[str, float]
    unavailable: list[NotBuilt]

    def expected(self, ahead: list[Recipe], wanted: set[str] | None) -> dict[str, float]:
        """The steps to come."""
        steps = dict(self.beside)
        for recipe in ahead:
            if wanted is None or recipe.id in wanted:
                steps.update(self.seconds(recipe))
        return steps


@dataclass
class Search:
    """Tries recipe after recipe, as `optimize.search` says, until none is left or the time is."""

    work: Work
    builder: Builder
    elapsed: Callable[[], float]
    outlook: Outlook

    def run(self) -> list[str]:
        """Returns what was decided, in words.

        Raises:
            UsageError: a recipe was asked for that does not exist.
        """
        state = State(facts_of(self.work))
        wanted = self._wanted(state)
        notes: list[str] = []
        while (recipe := state.next()) is not None:
            notes += [note for note in state.notes if note not in notes]
            if wanted is not None and recipe.id not in wanted:
                state.closed.add(recipe.id)
                continue
            ahead = search.outlook(state)
            self.work.progress.plan(self.outlook.expected(ahead, wanted))
            if self._too_late(recipe):
                self.builder.give_up(recipe.id, "the time budget does not allow it", build_step(recipe.id))
                state.closed.add(recipe.id)
                continue
            made = self.builder.make(recipe)
            if made is None:
                state.closed.add(recipe.id)
            else:
                state.tried[recipe.id] = Tried.of(made)
        return notes + [note for note in state.notes if note not in notes]

    def _too_late(self, recipe: Recipe) -> bool:
        budget = self.work.config.time_budget_minutes
        if budget is None or recipe.parent is None or recipe.id == recipes.ONNX_REFERENCE:
            return False
        if (variant_directory(self.work.config.out, recipe.id) / MANIFEST_FILE).exists():
            # Built by an earlier run: what is still missing of it costs little.
            return False
        return self.elapsed() + sum(self.outlook.seconds(recipe).values()) + CERTIFYING_SECONDS > budget * 60

    def _wanted(self, state: State) -> set[str] | None:
        """The recipes asked for and what they are made from; None for all."""
        if self.work.config.recipes is None:
            return None
        catalogue = {recipe.id: recipe for recipe in search.outlook(state)}
        unavailable = {item.id for item in self.outlook.unavailable}
        unknown = sorted(set(self.work.config.recipes) - set(catalogue) - unavailable)
        if unknown:
            raise UsageError(
                f"no recipe {unknown[0]!r} at effort {self.work.config.effort.value}; there are {', '.join(catalogue)}"
            )
        needed = {recipes.REFERENCE}
        for name in self.work.config.recipes:
            step: str | None = name
            while step in catalogue:
                needed.add(step)
                step = catalogue[step].parent
        return needed


def facts_of(work: Work) -> Facts:
    splits = frozenset(name for name in work.splits.by_name if work.has(name))
    return Facts(
        task=work.reference.task,
        layers=work.reference.layers,
        shared=work.reference.shares_layers,
        splits=splits,
        effort=work.config.effort,
        kv_heads=work.reference.decoder.kv_heads if work.reference.decoder is not None else 0,
    )


def seconds_beside(work: Work) -> dict[str, float]:
    """Of the steps that belong to no recipe."""
    steps = {
        answers_step(split): len(work.order(split)) / ANSWERED_PER_SECOND
        for split in ("test", "validation", "calibration")
        if work.has(split)
    }
    if work.has("validation", "calibration"):
        steps.update({finish.CERTIFY: CERTIFYING_SECONDS, finish.TRY_POINTS: CERTIFYING_SECONDS})
    return steps


def seconds_of(work: Work, recipe: Recipe) -> dict[str, float]:
    measuring = MEASURE_REFERENCE_SECONDS if recipe.parent is None else MEASURE_SECONDS
    steps = {build_step(recipe.id): recipe.expected_seconds, measure_step(recipe.id): measuring}
    if recipe.plan is not None and work.has("train"):
        steps.update(train.step_seconds(recipe.plan, len(work.order("train"))))
    return steps


def wanted_of(config: OptimizeConfig, items: list[NotBuilt]) -> list[NotBuilt]:
    """Those of what cannot be built here that were asked for."""
    return [item for item in items if config.recipes is None or item.id in config.recipes]


def _analysis(work: Work, builder: Builder, notes: list[str]) -> Analysis:
    overlaps = {
        name: variant.measured.quality.top10_overlap
        for name, variant in builder.built.items()
        if variant.measured is not None and variant.measured.quality.top10_overlap is not None
    }
    known = Analysis()
    if work.has("train"):
        try:
            with contained("importance"):
                known = train.analyse(work)
        except PassError as error:
            work.progress.fail(train.ANALYSIS, error.message)
    return known.model_copy(update={"notes": notes, "top10_overlap": overlaps})


def _check_no_text_options(config: OptimizeConfig) -> None:
    for name in ("prompt", "answer"):
        if getattr(config, name) is not None:
            raise UsageError(f"--{name} is for models that generate text, and this one does not", param=name)


def write_tokenizer(config: OptimizeConfig, reference: Reference) -> None:
    path = config.out / TOKENIZER_FILE
    path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_bytes() != reference.tokenizer_json:
        write_atomic(path, reference.tokenizer_json)
