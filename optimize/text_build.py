"""Variants of a language model as directories: what `optimize.build` does, with texts for answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from fettle.manifest import Measurements, VariantManifest
from fettle.text_trace import Trace
from optimize import measure, recipes, text_tracing
from optimize.build import Builder
from optimize.text_measure import TUNING_ROWS, Compared, measure_text, token_agreement
from optimize.text_work import TextWork


@dataclass
class TextBuilder(Builder):
    """See `Builder`."""

    work: TextWork
    _perplexity: float | None = field(default=None, init=False)

    def exam_parts(self) -> dict[str, object]:
        names = [name for name in ("test", "validation") if self.work.has(name)]
        return {"rows": self.work.fingerprint_of_rows(names)}

    def measured(self, manifest: VariantManifest, fingerprint: str, report: measure.Report) -> Measurements:
        if manifest.parent is None:
            return measure_text(self.work, manifest, None, fingerprint, report)
        return measure_text(self.work, manifest, self._truth(), fingerprint, report)

    def truth(self, split: str, rows: int | None = None) -> list[Trace]:
        """The reference's texts: its own on `test`, elsewhere its stand-in's where it has one."""
        teller = self.built[recipes.REFERENCE] if split == "test" else self.teller()
        return text_tracing.trace(self.work, teller, split, rows)

    def teller(self) -> VariantManifest:
        """The variant whose texts count as the reference's: its ONNX graph, if that gave each of its tokens on `test`;
        else itself."""
        reference, other = self.built[recipes.REFERENCE], self.built.get(recipes.ONNX_REFERENCE)
        if other is None:
            return reference
        pair = [text_tracing.trace(self.work, variant, "test") for variant in (other, reference)]
        return other if token_agreement(*pair)[1] == 1.0 else reference

    def _truth(self) -> Compared:
        found = self.built[recipes.REFERENCE].measured
        assert found is not None
        tuning: list[Trace] = []
        # Until the stand-in is measured, nobody but the reference could tell, at several times the cost.
        if self.work.has("validation") and recipes.ONNX_REFERENCE in self.built:
            tuning = self.truth("validation", TUNING_ROWS)
        perplexity = None if found.quality.text is None else found.quality.text.perplexity
        return Compared(self.truth("test"), tuning, perplexity)
