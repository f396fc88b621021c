"""Variants of a language model as directories: what `optimize.build` does, with texts for answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fettle.extract import Answer
from fettle.manifest import Measurements, VariantManifest
from optimize import measure, recipes, text_tracing
from optimize.build import Builder, Taught
from optimize.decoder_data import Ids
from optimize.decoder_load import DecoderReference
from optimize.decoder_train import TextStudent, make_text_student, school_of
from optimize.recipes import Plan
from optimize.text_measure import TUNING_ROWS, Compared, measure_text
from optimize.text_work import TextWork


@dataclass
class TextBuilder(Builder):
    """See `Builder`."""

    work: TextWork

    def teach(self, plan: Plan) -> TextStudent:
        return make_text_student(school_of(self.work, self._greedy), plan)

    def taught(self, student: Taught) -> DecoderReference:
        return self.work.reference.with_student(student.scorer)

    def recipe_parts(self) -> dict[str, object]:
        answer = self.work.reference.task.answer
        return {"answer": None if answer is None else answer.model_dump(mode="json")}

    def exam_parts(self) -> dict[str, object]:
        names = [name for name in ("test", "validation") if self.work.has(name)]
        return {"rows": self.work.fingerprint_of_rows(names)}

    def measured(self, manifest: VariantManifest, fingerprint: str, report: measure.Report) -> Measurements:
        if manifest.parent is None:
            return measure_text(self.work, manifest, None, fingerprint, report)
        return measure_text(self.work, manifest, self._compared(), fingerprint, report)

    def answers(self, split: str, rows: int | None = None) -> list[Answer]:
        """What the reference answers on the first rows of a split (all if None), generating itself, in torch."""
        traces = text_tracing.trace(self.work, self.built[recipes.REFERENCE], split, rows)
        return [self.work.extract(trace.text) for trace in traces]

    def _greedy(self, split: str, prompts: Sequence[Ids]) -> list[Ids]:
        """Answers to learn from, with the tokens that end them; the reference's graph writes them sooner than torch."""
        teller = self.built.get(recipes.ONNX_REFERENCE, self.built[recipes.REFERENCE])
        traces = text_tracing.trace(self.work, teller, split, len(prompts))
        end = self.work.reference.end_id
        ends = [trace.drawn > len(trace.ids) and end is not None for trace in traces]
        pairs = zip(traces, ends, strict=True)
        return [np.append(trace.ids, np.int32(end or 0)) if ended else trace.ids for trace, ended in pairs]

    def _compared(self) -> Compared:
        """What the reference answers, where this is to be compared."""
        reference = self.built[recipes.REFERENCE]
        assert reference.measured is not None
        assert reference.measured.quality.text is not None
        # The search has nothing to learn from how the reference's own graph answers.
        tunes = self.work.has("validation") and recipes.ONNX_REFERENCE in self.built
        return Compared(
            test=text_tracing.trace(self.work, reference, "test"),
            tuning=self.answers("validation", TUNING_ROWS) if tunes else [],
            perplexity=reference.measured.quality.text.perplexity,
        )
