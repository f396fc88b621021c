"""How each variant is made: its student if it has one, its passes with every parameter, its runtime and precision.

A pass is a plain function over a model and directories. Which recipes are tried, and in which order, is
`optimize.search`. What this machine cannot build is listed as well, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from fettle.errors import PassError
from fettle.manifest import NotBuilt, Precision, Runtime, Stage
from fettle.rows import Rows

if TYPE_CHECKING:
    from optimize.exits import MultiExit
    from optimize.load import Reference

ONNX_FILE = "model.onnx"
REFERENCE, ONNX_REFERENCE, TRIMMED = "torch-fp32", "onnx-fp32", "onnx-fp32-trim"

CUDA_RECIPES = (
    "onnx-fp16-cuda",
    "tensorrt-fp16",
    "tensorrt-int8",
    "torch-fp16-cuda-graphs",
    "torch-int8-cuda",
    "torch-fp8-cuda",
)

Notes = dict[str, JsonValue]


class Scheme(StrEnum):
    """Ways to quantize a graph."""

    DYNAMIC = "dynamic"
    STATIC = "static"
    ROWS = "rows"
    WEIGHTS8 = "weights8"
    WEIGHTS4 = "weights4"


@dataclass(slots=True)
class Bench:
    """What a pass works with: it writes into `directory`, and reads its parent's files if the recipe has one.

    `reference` holds the model that is exported: the user's own, or a student in its place. `stages` is filled by
    the pass that cuts a graph into stages; `packed` says whether its graph needs no padding.
    """

    reference: Reference
    directory: Path
    parent: Path | None
    sample: Rows
    calibration: Callable[[], Rows]
    multi_exit: MultiExit | None = None
    stages: list[Stage] = field(default_factory=list)
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """One step. `expected_seconds` only shapes the estimate of the time left, until real times are known."""

    name: str
    apply: Callable[[Bench], Notes]
    parameters: Notes = field(default_factory=dict)
    expected_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Round:
    """A change of shape (by name, with what it needs to know) and the distillation that makes up for it.

    The weights are those of the losses on hidden states and on relations among tokens, beside the answers' own.
    """

    change: str
    parameters: Notes = field(default_factory=dict)
    epochs: float = 1.0
    learning_rate: float = 2e-4
    hidden_weight: float = 0.0
    relation_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How a student is made from the reference: rounds in order; exit heads after the layers `exits`, if any.

    `frozen`: the backbone stays as it is, and only the heads are trained.
    """

    id: str
    rounds: tuple[Round, ...] = ()
    exits: tuple[int, ...] = ()
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    id: str
    runtime: Runtime
    precision: Precision
    passes: tuple[Pass, ...]
    parent: str | None = REFERENCE
    plan: Plan | None = None
    row_by_row: bool = False
    needs: tuple[str, ...] = ()

    @property
    def expected_seconds(self) -> float:
        return sum(step.expected_seconds for step in self.passes)


def reference_recipe() -> Recipe:
    return Recipe(REFERENCE, Runtime.TORCH, Precision.FP32, (checkpoint("float32"),), parent=None)


def bfloat16_recipe() -> Recipe:
    return Recipe("torch-bf16", Runtime.TORCH, Precision.BF16, (checkpoint("bfloat16"),))


def onnx_recipe() -> Recipe:
    return Recipe(ONNX_REFERENCE, Runtime.ONNX, Precision.FP32, (EXPORT, FUSE, PACK))


def trimmed_recipe() -> Recipe:
    passes = (from_parent(TRIM, required=True), PACK)
    return Recipe(TRIMMED, Runtime.ONNX, Precision.FP32, passes, parent=ONNX_REFERENCE)


def quantized_recipe(scheme: Scheme, parent: str) -> Recipe:
    names = {Scheme.ROWS: "onnx-int8", Scheme.WEIGHTS8: "onnx-weights-int8", Scheme.WEIGHTS4: "onnx-weights-int4"}
    return Recipe(
        names.get(scheme, f"onnx-int8-{scheme.value}"),
        Runtime.ONNX,
        Precision.INT4 if scheme is Scheme.WEIGHTS4 else Precision.INT8,
        (from_parent(quantize(scheme)), PACK),
        parent=parent,
    )


def small_recipe(scheme: Scheme) -> Recipe:
    """A quantized variant whose embedding tables are quantized as well: most of what is left of its size."""
    parent = quantized_recipe(scheme, ONNX_REFERENCE).id
    passes = (from_parent(EMBEDDINGS), PACK)
    return Recipe(f"{parent}-small", Runtime.ONNX, Precision.INT8, passes, parent=parent)


def student_recipe(plan: Plan, scheme: Scheme) -> Recipe:
    """A student in the given quantization; as stages if it has exits."""
    cut = (SPLIT,) if plan.exits else ()
    export = EXPORT_STAGES if plan.exits else EXPORT
    # Dynamic int8 takes one scale over all tokens, so it has to know beforehand which there are. The others treat each
    # token alike, and fit their ranges better to layers that do not stand twice in the graph.
    trimmed = (TRIM, quantize(scheme)) if scheme is Scheme.DYNAMIC else (quantize(scheme), TRIM)
    return Recipe(
        f"{plan.id}-int8",
        Runtime.ONNX,
        Precision.INT8,
        (export, FUSE, *trimmed, EMBEDDINGS, PACK, *cut),
        plan=plan,
        needs=("train", "validation"),
    )


def unavailable() -> list[NotBuilt]:
    """Variants that this machine, or this version of Fettle, cannot build."""
    import torch

    if torch.cuda.is_available():
        reason = "this version of Fettle builds no variants for CUDA yet"
    else:
        reason = "needs a CUDA device, and none is visible here"
    zeros = "zeros in a dense weight save no time: no kernel of ONNX Runtime or torch skips them on a CPU"
    return [
        *(NotBuilt(id=name, reason=reason) for name in CUDA_RECIPES),
        NotBuilt(id="sparse-unstructured", reason=f"{zeros}; heads, neurons and layers are removed instead"),
        NotBuilt(id="sparse-2of4", reason=f"{zeros}; this pattern {reason}"),
    ]


# Passes. Each reads and writes `model.onnx` of the bench's directory, unless it makes it.


def checkpoint(dtype: str) -> Pass:
    """The weights in this type of torch's."""

    def apply(bench: Bench) -> Notes:
        import torch

        from optimize.checkpoint import save_checkpoint

        return save_checkpoint(bench.reference, bench.directory, getattr(torch, dtype))

    return Pass("checkpoint", apply, {"dtype": dtype})


def _export(bench: Bench) -> Notes:
    from optimize.export import export_onnx

    return export_onnx(bench.reference, bench.directory / ONNX_FILE, bench.sample)


def _export_stages(bench: Bench) -> Notes:
    from optimize.stages import export_multi_exit

    assert bench.multi_exit is not None
    return export_multi_exit(bench.reference, bench.multi_exit, bench.directory / ONNX_FILE, bench.sample)


def _fuse(bench: Bench) -> Notes:
    from optimize.fuse import fuse

    return rewritten(bench, partial(fuse, sample=bench.sample, spec=bench.reference.tokenizer))


def _trim(bench: Bench) -> Notes:
    from optimize.first_token import first_token

    return rewritten(bench, partial(first_token, sample=bench.sample, spec=bench.reference.tokenizer))


def _pack(bench: Bench) -> Notes:
    from optimize.pack import pack

    notes = rewritten(bench, partial(pack, sample=bench.sample, spec=bench.reference.tokenizer))
    bench.packed = notes["packed"] != 0
    return notes


def _split(bench: Bench) -> Notes:
    from optimize.stages import split

    whole = bench.directory / ONNX_FILE
    bench.stages = split(whole, bench.directory)
    for path in bench.directory.glob(f"{ONNX_FILE}*"):
        path.unlink()
    return {"stages": len(bench.stages)}


def quantize(scheme: Scheme) -> Pass:
    def apply(bench: Bench) -> Notes:
        return rewritten(bench, lambda old, new: _quantized(scheme, old, new, bench))

    return Pass("quantize", apply, {"scheme": scheme.value}, expected_seconds=4 if scheme is Scheme.DYNAMIC else 25)


def _small_embeddings(bench: Bench) -> Notes:
    from optimize.quantize_weights import quantize_embeddings_int8

    return rewritten(bench, quantize_embeddings_int8)


def _quantized(scheme: Scheme, old: Path, new: Path, bench: Bench) -> Notes:
    from optimize import quantize, quantize_rows, quantize_static, quantize_weights

    match scheme:
        case Scheme.DYNAMIC:
            return quantize.quantize_dynamic_int8(old, new, per_channel=True)
        case Scheme.ROWS:
            return quantize_rows.quantize_rows_int8(old, new, bench.calibration(), bench.reference.tokenizer)
        case Scheme.STATIC:
            return quantize_static.quantize_static_int8(old, new, bench.calibration(), bench.reference.tokenizer)
        case Scheme.WEIGHTS8:
            return quantize_weights.quantize_weights(old, new, bits=8)
        case Scheme.WEIGHTS4:
            return quantize_weights.quantize_weights(old, new, bits=4)


EXPORT = Pass("export", _export, expected_seconds=12)
EXPORT_STAGES = Pass("export-stages", _export_stages, expected_seconds=14)
FUSE = Pass("fuse", _fuse, expected_seconds=2)
TRIM = Pass("first-token", _trim, expected_seconds=2)
EMBEDDINGS = Pass("quantize-embeddings", _small_embeddings, expected_seconds=2)
PACK = Pass("pack", _pack, expected_seconds=2)
SPLIT = Pass("split", _split, expected_seconds=1)


def from_parent(step: Pass, *, required: bool = False) -> Pass:
    """The pass on the parent's graph, in rows. `required`: a pass that changes nothing makes no variant of its own."""

    def apply(bench: Bench) -> Notes:
        from optimize.pack import unpack

        if bench.parent is None:
            raise PassError(f"{step.name} needs a parent variant")
        for path in bench.parent.glob(f"{ONNX_FILE}*"):
            (bench.directory / path.name).write_bytes(path.read_bytes())
        unpack(bench.directory / ONNX_FILE)
        notes = step.apply(bench)
        if required and notes.get("trimmed") == 0:
            raise PassError(f"{step.name}: {notes.get('reason', 'nothing to do on this graph')}")
        return notes

    return Pass(step.name, apply, step.parameters, step.expected_seconds)


def rewritten(bench: Bench, rewrite: Callable[[Path, Path], Notes]) -> Notes:
    """Replace the graph of the bench by a rewritten one."""
    graph = bench.directory / ONNX_FILE
    old = graph.replace(bench.directory / f"old-{ONNX_FILE}")
    weights = bench.directory / f"{ONNX_FILE}.data"
    before = weights.stat().st_mtime_ns if weights.exists() else None
    notes = rewrite(old, graph)
    old.unlink()
    # Weights beyond 2 GB lie in a file of their own, which a smaller graph no longer has.
    if before is not None and weights.stat().st_mtime_ns == before:
        weights.unlink()
    return notes
