"""How each variant is made: its parent, its passes with every parameter, its runtime and precision.

A pass is a plain function over the reference and directories. What this machine cannot build is listed as well,
with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from fettle.errors import UsageError
from fettle.manifest import NotBuilt, Precision, Runtime
from fettle.rows import Rows

if TYPE_CHECKING:
    from optimize.load import Reference

ONNX_FILE = "model.onnx"
REFERENCE = "torch-fp32"

Notes = dict[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Bench:
    """What a pass works with: it writes into `directory`, and reads its parent's files if the recipe has one."""

    reference: Reference
    directory: Path
    parent: Path | None
    sample: Rows


@dataclass(frozen=True, slots=True)
class Pass:
    """One step. `expected_seconds` only shapes the estimate of the time left, until real times are known."""

    name: str
    apply: Callable[[Bench], Notes]
    parameters: Notes = field(default_factory=dict)
    expected_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    id: str
    runtime: Runtime
    precision: Precision
    passes: tuple[Pass, ...]
    parent: str | None = REFERENCE

    @property
    def expected_seconds(self) -> float:
        return sum(step.expected_seconds for step in self.passes)


def encoder_recipes() -> list[Recipe]:
    """All recipes for encoders, parents before children; the first is the reference."""
    return [
        Recipe(REFERENCE, Runtime.TORCH, Precision.FP32, (_checkpoint("float32"),), parent=None),
        Recipe("torch-bf16", Runtime.TORCH, Precision.BF16, (_checkpoint("bfloat16"),)),
        Recipe(
            "onnx-fp32",
            Runtime.ONNX,
            Precision.FP32,
            (Pass("export", _export, expected_seconds=12), Pass("fuse", _fuse, expected_seconds=2)),
        ),
        Recipe(
            "onnx-int8-dynamic",
            Runtime.ONNX,
            Precision.INT8,
            (Pass("quantize", _quantize, {"scheme": "dynamic", "per_channel": True}, expected_seconds=3),),
            parent="onnx-fp32",
        ),
    ]


def chosen(wanted: list[str] | None) -> list[Recipe]:
    """The recipes with these ids and what they are derived from; all of them if None.

    Raises:
        UsageError: there is no recipe of that name.
    """
    recipes = {recipe.id: recipe for recipe in encoder_recipes()}
    if wanted is None:
        return list(recipes.values())
    unknown = sorted(set(wanted) - set(recipes) - {item.id for item in unavailable()})
    if unknown:
        raise UsageError(f"no recipe {unknown[0]!r}; there are {', '.join(recipes)}")
    needed = {REFERENCE}
    for name in wanted:
        step: str | None = name
        while step in recipes:
            needed.add(step)
            step = recipes[step].parent
    return [recipe for recipe in recipes.values() if recipe.id in needed]


def unavailable() -> list[NotBuilt]:
    """Variants that this machine, or this version of Fettle, cannot build."""
    import torch

    if torch.cuda.is_available():
        reason = "this version of Fettle builds no variants for CUDA yet"
    else:
        reason = "needs a CUDA device, and none is visible here"
    return [NotBuilt(id=name, reason=reason) for name in ("onnx-fp16-cuda", "tensorrt-fp16")]


def _checkpoint(dtype: str) -> Pass:
    def apply(bench: Bench) -> Notes:
        import torch

        from optimize.checkpoint import save_checkpoint

        return save_checkpoint(bench.reference, bench.directory, getattr(torch, dtype))

    return Pass("checkpoint", apply, {"dtype": dtype})


def _export(bench: Bench) -> Notes:
    from optimize.export import export_onnx

    return export_onnx(bench.reference, bench.directory / ONNX_FILE, bench.sample)


def _fuse(bench: Bench) -> Notes:
    from optimize.fuse import fuse

    plain = bench.directory / ONNX_FILE
    unfused = plain.replace(bench.directory / "plain.onnx")
    notes = fuse(unfused, plain, bench.sample, bench.reference.tokenizer)
    unfused.unlink()
    return notes


def _quantize(bench: Bench) -> Notes:
    from optimize.quantize import quantize_dynamic_int8

    if bench.parent is None:
        raise UsageError("quantize needs a parent variant")
    return quantize_dynamic_int8(bench.parent / ONNX_FILE, bench.directory / ONNX_FILE, per_channel=True)
