"""Variants of a language model as directories: what `optimize.build` does, with texts for answers."""

from __future__ import annotations

from dataclasses import dataclass

from fettle.extract import Answer
from fettle.manifest import Measurements, VariantManifest
from optimize import measure, recipes, text_tracing
from optimize.build import Builder
from optimize.text_measure import TUNING_ROWS, Compared, measure_text
from optimize.text_work import TextWork


@dataclass
class TextBuilder(Builder):
    """See `Builder`."""

    work: TextWork

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
