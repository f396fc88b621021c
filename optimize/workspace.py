"""One run's inputs, and everything that is computed from them once: rows, the reference's answers, the exam.

Each thing is made when it is first needed, kept in the family's cache under a fingerprint, and said on the progress.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import orjson

from fettle import __version__
from fettle.answers import Floats
from fettle.config import Effort, OptimizeConfig
from fettle.family import TOKENIZER_FILE
from fettle.manifest import SCHEMA_VERSION, Hardware, Head, Task, TaskKind
from fettle.rows import Row, Rows
from fettle.store import sha256_bytes
from fettle.tokenizer import Tokenizer
from optimize import hardware, measure
from optimize.cache import Cache
from optimize.data import Splits
from optimize.labels import Targets, map_labels
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.load import Reference

# More rows than these add minutes and little else at the given effort; calibration rows decide what can be certified.
ROW_LIMITS = {
    Effort.QUICK: {"train": 4000, "validation": 1500, "calibration": 2500},
    Effort.STANDARD: {"train": 20_000, "validation": 5000, "calibration": 20_000},
    Effort.THOROUGH: {"train": 200_000, "validation": 20_000, "calibration": 100_000},
}
SAMPLE_ROWS = 8
TUNING_ROWS = 1000
CALIBRATION_TEXTS = 256
# Other programs at work on this much of the machine make the measured latencies too high.
QUIET = 0.2


@dataclass
class Work:
    config: OptimizeConfig
    progress: Progress
    reference: Reference
    splits: Splits

    @cached_property
    def cache(self) -> Cache:
        return Cache(self.config.out)

    @cached_property
    def hardware(self) -> Hardware:
        return hardware.describe()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.config.out / TOKENIZER_FILE, self.reference.tokenizer)

    def has(self, *names: str) -> bool:
        """Whether the data have these splits, with at least one row each."""
        return all(name in self.splits.by_name and len(self.splits[name]) for name in names)

    # Rows. Each split is put into an order that mixes what a sorted file keeps apart, and is cut after it.

    def order(self, split: str) -> list[int]:
        """Which rows of a split are used, and in which order."""
        limit = self.config.max_rows if split == "test" else ROW_LIMITS[self.config.effort].get(split)
        shuffled = np.random.default_rng(self.config.seed).permutation(len(self.splits[split]))
        return [int(row) for row in shuffled[:limit]]

    def rows(self, split: str) -> list[Row]:
        if split not in self._rows:
            texts = self.splits[split].texts
            self._rows[split] = self.tokenizer.encode([texts[row] for row in self.order(split)])
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        return {}

    @cached_property
    def sample(self) -> Rows:
        """A few rows that graphs are checked on."""
        return Rows.of(self.rows("test")[:SAMPLE_ROWS])

    @cached_property
    def calibration_rows(self) -> Rows:
        """Rows that ranges of activations are taken from; never those that certificates come from."""
        split = next((name for name in ("train", "validation") if self.has(name)), "test")
        return Rows.of(self.rows(split)[:CALIBRATION_TEXTS])

    # Answers.

    def answers(self, split: str) -> Floats:
        """The reference's values on all rows of a split, in the order of `rows`: float32 [rows, width]."""
        if split not in self._answers:
            self._answers[split] = self._cached_answers(split)
        return self._answers[split]

    @cached_property
    def _answers(self) -> dict[str, Floats]:
        return {}

    def _cached_answers(self, split: str) -> Floats:
        step = answers_step(split)

        def compute() -> dict[str, Floats]:
            with self.progress.step(step) as report:
                return {"values": self._computed_answers(split, report)}

        fingerprint = self.fingerprint_of(split=self.splits[split].sha256, rows=len(self.rows(split)))
        name = f"answers-{split}"
        if self.cache.has_arrays(name, fingerprint):
            self.progress.skip(step, "already there")
        return self.cache.arrays(name, fingerprint, compute)["values"]

    def _computed_answers(self, split: str, report: Callable[[float], None]) -> Floats:
        if split == "train":
            # Soft labels to learn from may be rounded; what is certified may not.
            return measure.soft_values(self.reference, self.rows(split), report)
        return measure.reference_values(self.reference, self.rows(split), report)

    def targets(self, split: str, rows: int | None = None) -> Targets | None:
        labels = self.splits[split].labels
        if labels is None or self.reference.task.kind is TaskKind.EMBED:
            return None
        return map_labels([labels[row] for row in self.order(split)[:rows]], self.reference.task)

    @cached_property
    def exam(self) -> measure.Exam:
        busy = hardware.busy_share()
        if busy > QUIET:
            self.progress.warn(
                f"other programs keep {busy:.0%} of the processors busy, so the latencies will come out too high; "
                "repeat with --remeasure when the machine is quiet"
            )
        count = self.config.max_rows
        targets = self.targets("test", count)
        if targets is not None and targets.warning:
            self.progress.warn(targets.warning)
        only = _only_answer(self.answers("test")[:count], self.reference.task)
        if only is not None:
            self.progress.warn(
                f"the model answers {only!r} on every row of test, so no figure says anything about its other labels; "
                "give data in which they occur"
            )
        tuning = self.rows("validation")[:TUNING_ROWS] if self.has("validation") else []
        empty = np.zeros((0, self.reference.task.width), np.float32)
        return measure.Exam(
            task=self.reference.task,
            rows=self.rows("test")[:count],
            reference=self.answers("test")[:count],
            tuning_rows=tuning,
            tuning_reference=self.answers("validation")[: len(tuning)] if tuning else empty,
            targets=targets,
            threads=self.config.threads,
            hardware=self.hardware,
            cosine_floor=self.config.cosine_floor,
        )

    # Fingerprints.

    @property
    def fingerprinted_task(self) -> Task:
        return self.reference.task

    def fingerprint_of(self, **parts: object) -> str:
        """Over what is given, the model, the task, the seed and the versions of the libraries."""
        return fingerprint_of(
            fettle=__version__,
            schema=SCHEMA_VERSION,
            source=self.reference.source.sha256,
            task=self.fingerprinted_task.model_dump(mode="json"),
            seed=self.config.seed,
            libraries=self.hardware.versions,
            **parts,
        )


def _only_answer(values: Floats, task: Task) -> str | None:
    """The label that all rows get, if the model has others."""
    if task.head is not Head.SINGLE_LABEL or task.width == 1:
        return None
    found = np.unique(values.argmax(axis=1))
    return task.labels[found[0]] if len(found) == 1 else None


def answers_step(split: str) -> str:
    return f"answers of the reference on {split}"


def fingerprint_of(**parts: object) -> str:
    """Hex SHA-256 over named values, each of which is plain JSON."""
    return sha256_bytes(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))
