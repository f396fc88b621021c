"""One run's inputs where the model generates text: prompts as rows, what their answers are, and kept generations.

What an encoder's run has of the reference's answers is here its greedy texts, kept as traces (`optimize.text_tracing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fettle.config import Effort
from fettle.extract import Extract
from fettle.manifest import Task
from fettle.rows import Row, Rows
from optimize.decoder_data import Ids, Prompts
from optimize.decoder_load import DecoderReference
from optimize.workspace import CALIBRATION_TEXTS, Work

# A text takes hundreds of times as long as an encoder's answer.
ROW_LIMITS = {
    Effort.QUICK: {"train": 4000, "validation": 500, "calibration": 1000, "test": 500},
    Effort.STANDARD: {"train": 20_000, "validation": 3000, "calibration": 5000, "test": 3000},
    Effort.THOROUGH: {"train": 200_000, "validation": 10_000, "calibration": 20_000, "test": 10_000},
}


@dataclass
class TextWork(Work):
    """See `Work`. Rows are prompts; those that leave no room for a whole text are left out."""

    reference: DecoderReference
    prompts: Prompts
    extract: Extract
    _orders: dict[str, list[int]] = field(default_factory=dict)

    @property
    def max_tokens(self) -> int:
        return self.config.max_tokens

    def order(self, split: str) -> list[int]:
        if split not in self._orders:
            self._orders[split] = self._fitting(split)
        return self._orders[split]

    def rows(self, split: str) -> list[Row]:
        self.order(split)
        return self._rows[split]

    @cached_property
    def calibration_rows(self) -> Rows:
        """Whole texts that ranges of activations are taken from; never those that certificates come from."""
        split = next((name for name in ("train", "validation") if self.has(name)), "test")
        return Rows.of([Row(ids) for ids in self.texts(split, CALIBRATION_TEXTS)])

    def right_answers(self, split: str) -> list[str | None] | None:
        """What the data say is right, row by row, where they say anything."""
        labels = self.splits[split].labels
        return None if labels is None else [labels[row] for row in self.order(split)]

    def texts(self, split: str, count: int) -> list[Ids]:
        """Prompts with their right answers and an end token, of the first rows: what perplexity is measured on."""
        answers = self.right_answers(split) or [None] * count
        end = self.reference.end_id
        ids = [row.ids for row in self.rows(split)[:count]]
        found = self.prompts.encode_answers([answer or "" for answer in answers[: len(ids)]])
        ends = [np.array([] if end is None or not len(each) else [end], np.int32) for each in found]
        limit = self.reference.decoder.context
        return [np.concatenate(parts)[:limit] for parts in zip(ids, found, ends, strict=True)]

    @property
    def fingerprinted_task(self) -> Task:
        """What is read from texts does not matter to what is made of the model."""
        return self.reference.task.model_copy(update={"answer": None, "instruction": None})

    def fingerprint_of_rows(self, splits: Sequence[str]) -> dict[str, object]:
        """What decides which prompts there are; plain JSON."""
        return {
            "splits": {name: [self.splits[name].sha256, len(self.order(name))] for name in splits},
            "seed": self.config.seed,
            "max_tokens": self.max_tokens,
        }

    def _fitting(self, split: str) -> list[int]:
        limit = ROW_LIMITS[self.config.effort][split]
        if split == "test":
            limit = min(limit, self.config.max_rows)
        shuffled = np.random.default_rng(self.config.seed).permutation(len(self.splits[split]))[:limit]
        texts = self.splits[split].texts
        ids = self.prompts.encode([str(texts[row]) for row in shuffled])
        kept = self.prompts.fitting(ids, self.max_tokens)
        if len(kept) < len(ids):
            self.progress.warn(
                f"{len(ids) - len(kept)} prompts of {split} leave no room for {self.max_tokens} tokens in a context "
                f"of {self.prompts.context}, and are left out"
            )
        self._rows[split] = [Row(ids[place]) for place in kept]
        return [int(shuffled[place]) for place in kept]
