"""How the variants of a language model are made, and in which order they are tried; `optimize.recipes` has the words.

What this machine cannot build is listed as well, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fettle.config import Effort
from fettle.errors import PassError
from fettle.manifest import NotBuilt, Precision, Runtime
from optimize.recipes import (
    ONNX_FILE,
    ONNX_REFERENCE,
    Bench,
    Notes,
    Pass,
    Plan,
    Recipe,
    Round,
    from_parent,
    reference_recipe,
    rewritten,
)
from optimize.workspace import CALIBRATION_TEXTS

if TYPE_CHECKING:
    from optimize.search import Facts, State

CUDA_RECIPES = ("torch-bf16-cuda", "torch-int8-cuda", "torch-fp8-cuda", "torch-int4-cuda")
INT8, INT4 = "onnx-int8", "onnx-int4"
# A round that `optimize.decoder_train` knows.
SHRINK = "shrink"


def text_agenda(state: State) -> Iterator[Recipe]:
    """All recipes in the order of trying; parents before children, cheap ones before dear ones."""
    yield reference_recipe()
    yield Recipe(ONNX_REFERENCE, Runtime.ONNX, Precision.FP32, (EXPORT,))
    yield Recipe(INT8, Runtime.ONNX, Precision.INT8, (from_parent(ROWS),), parent=ONNX_REFERENCE)
    yield Recipe(INT4, Runtime.ONNX, Precision.INT4, (from_parent(WEIGHTS4),), parent=ONNX_REFERENCE)
    if state.facts.trains and state.facts.effort is not Effort.QUICK:
        yield from map(student_recipe, plans(state.facts))


def plans(facts: Facts) -> Iterator[Plan]:
    """Students, those with little to make up for first."""
    thorough = facts.effort is Effort.THOROUGH
    layers, epochs = facts.layers, 2.0 if thorough else 1.0
    if layers > 2:
        kept = layers - max(1, layers // 3)
        yield Plan(f"pruned-layers-{kept}", (Round(SHRINK, {"layers": kept}, epochs),))
    yield Plan("pruned-neurons-50", (Round(SHRINK, {"neurons": 0.5}, epochs),))
    if layers > 1:
        half = layers // 2
        yield Plan(f"distilled-{half}", (Round(SHRINK, {"layers": half}, 2 * epochs),))
        if thorough:
            yield Plan(f"distilled-{half}-narrow", (Round(SHRINK, {"layers": half, "neurons": 0.5}, 3 * epochs),))
    if thorough and facts.kv_heads > 1 and facts.kv_heads % 2 == 0:
        yield Plan("merged-heads", (Round(SHRINK, {"pooled": facts.kv_heads // 2}, epochs),))


def student_recipe(plan: Plan) -> Recipe:
    """A student's graph in int8, which costs least of the schemes where many texts are written at once."""
    return Recipe(
        f"{plan.id}-int8",
        Runtime.ONNX,
        Precision.INT8,
        (EXPORT, ROWS),
        plan=plan,
        needs=("train", "validation"),
    )


def text_unavailable() -> list[NotBuilt]:
    """Variants that this machine, or this version of Fettle, cannot build."""
    import torch

    if torch.cuda.is_available():
        reason = "this version of Fettle builds no variants for CUDA yet"
    else:
        reason = "needs a CUDA device, and none is visible here"
    zeros = "zeros in a dense weight save no time; heads, neurons and layers are removed instead"
    return [
        *(NotBuilt(id=name, reason=reason) for name in CUDA_RECIPES),
        NotBuilt(id="sparse-unstructured", reason=zeros),
        NotBuilt(id="sparse-2of4", reason=f"{zeros}; this pattern {reason}"),
    ]


def _export(bench: Bench) -> Notes:
    from optimize.decoder_graph import export_decoder
    from optimize.decoder_load import DecoderReference

    if not isinstance(bench.reference, DecoderReference):
        raise PassError("a decoder graph is made of language models alone")
    return export_decoder(bench.reference.language, bench.directory / ONNX_FILE, bench.reference.decoder.context)


def _rows(bench: Bench) -> Notes:
    from optimize.decoder_quantize import quantize_decoder_int8

    return rewritten(bench, lambda old, new: quantize_decoder_int8(old, new, bench.calibration()))


def _weights4(bench: Bench) -> Notes:
    from optimize.decoder_quantize import quantize_decoder_int4

    return rewritten(bench, lambda old, new: quantize_decoder_int4(old, new, bench.calibration()))


EXPORT = Pass("export", _export, expected_seconds=5)
ROWS = Pass("quantize", _rows, {"scheme": "rows", "texts": CALIBRATION_TEXTS}, expected_seconds=20)
WEIGHTS4 = Pass("quantize", _weights4, {"scheme": "weights4", "texts": CALIBRATION_TEXTS}, expected_seconds=40)
