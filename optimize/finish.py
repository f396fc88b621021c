"""What comes after the variants: operating points certified and tried on `test`, the dominated set aside, the family.

`family.json` is written when everything that it names is final, and the report last of all.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fettle import __version__
from fettle.answers import Floats, disagreements
from fettle.config import Effort
from fettle.drift import score_bins
from fettle.errors import PassError
from fettle.family import (
    FAMILY_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Family,
    record_files,
    variant_directory,
    write_manifest,
)
from fettle.latency import estimate_ms
from fettle.manifest import (
    Analysis,
    Dropped,
    FamilyManifest,
    LabelDisagreement,
    Level,
    Measurements,
    NotBuilt,
    OperatingPoint,
    Outcome,
    Precision,
    Runtime,
    SelfDisagreement,
    VariantEntry,
    VariantManifest,
    VotePoint,
)
from fettle.points import has_scores, whole
from fettle.store import sha256_bytes
from optimize import measure, recipes
from optimize.cache import FOLDER
from optimize.certify import Candidate, Problem, certify, label_disagreement
from optimize.search import Tried, dominated
from optimize.tracing import Traces, trace_all
from optimize.workspace import Work

# Settings that the command line has an option for, and its name.
OPTIONS = {
    "out": "out",
    "name": "name",
    "task": "task",
    "effort": "effort",
    "time_budget_minutes": "time-budget",
    "recipes": "recipe",
    "levels": "level",
    "delta": "delta",
    "cosine_floor": "cosine-floor",
    "threads": "threads",
    "max_rows": "max-rows",
    "votes": "votes",
    "vote_temperature": "vote-temperature",
    "prompt": "prompt",
    "answer": "answer",
    "max_tokens": "max-tokens",
    "seed": "seed",
}
CERTIFY, TRY_POINTS = "search and certify operating points", "try the operating points on test"
# Tracing costs minutes for each, and what is far from the reference answers few rows of any cascade.
MOST_CANDIDATES = {Effort.QUICK: 4, Effort.STANDARD: 8, Effort.THOROUGH: 12}
DROPPED_FOLDER = f"{FOLDER}/dropped"


@dataclass
class Findings:
    """What is known of the family beside its variants."""

    points: list[OperatingPoint] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    analysis: Analysis = field(default_factory=Analysis)
    self_disagreement: SelfDisagreement | None = None
    votes: list[VotePoint] = field(default_factory=list)


def find_points(work: Work, variants: Mapping[str, VariantManifest], analysis: Analysis) -> Findings:
    """Search, certify and try operating points; without the splits for it, say for each level why there is none."""
    findings = Findings(analysis=analysis, self_disagreement=self_disagreement(variants[recipes.REFERENCE]))
    missing = [name for name in ("validation", "calibration") if not work.has(name)]
    if missing or recipes.ONNX_REFERENCE not in variants:
        reason = (
            f"the data have no {missing[0]} split; give --{missing[0]} or --data"
            if missing
            else f"{recipes.ONNX_REFERENCE} could not be made, and it is what a point falls back on"
        )
        findings.levels = [Level(alpha=alpha, reason=reason) for alpha in sorted(work.config.levels)]
        return findings
    traces = trace_all(work, candidates(work, variants))
    if _fallback(variants) not in traces:
        reason = "the reference could not be run"
        findings.levels = [Level(alpha=alpha, reason=reason) for alpha in sorted(work.config.levels)]
        return findings
    problem = _problem(work, variants, traces, findings.self_disagreement)
    with work.progress.step(CERTIFY) as report:
        found = certify(problem, sorted(work.config.levels), work.config.delta, report=report)
    findings.levels = found.levels
    values: dict[str, Floats] = {}
    try:
        findings.points, values = try_points(work, variants, found.points)
    except PassError as error:
        # What is certified holds without it.
        findings.points = found.points
        work.progress.fail(TRY_POINTS, error.message)
    labels = _by_label(work, values)
    notes = [*analysis.notes, *found.notes]
    findings.analysis = analysis.model_copy(update={"scores": found.scores, "labels": labels, "notes": notes})
    return findings


def candidates(work: Work, variants: Mapping[str, VariantManifest]) -> list[VariantManifest]:
    """Variants that a point may use: the most promising, which cost little for how much they get right.

    A variant whose answers depend on the batch would have to be certified in the worst of several batchings; it is
    left out where one that does not depend on it has the same parent. Torch's variants are left out too: ONNX Runtime
    runs the same weights faster on a CPU.
    """
    onnx = [variant for variant in variants.values() if variant.runtime is not Runtime.TORCH]
    steady = {variant.parent for variant in onnx if variant.precision is not Precision.FP32 and _invariant(variant)}
    onnx = [variant for variant in onnx if _invariant(variant) or variant.parent not in steady]
    fallback = _fallback(variants)
    rest = [variant for variant in onnx if variant.id not in (fallback, recipes.ONNX_REFERENCE)]
    if has_scores(work.reference.task):
        # A cascade pays for its first variant on every row, and gains on those that it answers.
        rest.sort(key=lambda variant: _expected_cascade_ms(variant, variants[fallback]))
    most = MOST_CANDIDATES[work.config.effort]
    return [variants[fallback], *rest[: most - 1]]


def _invariant(variant: VariantManifest) -> bool:
    return variant.measured is not None and variant.measured.batching.invariant


def _expected_cascade_ms(variant: VariantManifest, fallback: VariantManifest) -> float:
    """Roughly what a row costs if twice as many rows as the variant gets wrong go on to the fallback."""
    mine, last = Tried.of(variant), Tried.of(fallback)
    # Exits halve a staged variant's cost or so, but for the ranking it is enough that they lower it.
    share = 0.6 if variant.exits else 1.0
    return share * mine.cpu_ms + min(1.0, 2 * mine.disagreement) * last.cpu_ms


def _fallback(variants: Mapping[str, VariantManifest]) -> str:
    """The variant that gives the reference's own answers at the least cost."""
    exact = [name for name in (recipes.TRIMMED, recipes.ONNX_REFERENCE) if name in variants]
    return min(exact, key=lambda name: Tried.of(variants[name]).cpu_ms)


def _problem(
    work: Work,
    variants: Mapping[str, VariantManifest],
    traces: Mapping[str, Traces],
    myself: SelfDisagreement | None,
) -> Problem:
    return Problem(
        task=work.reference.task,
        reference=_fallback(variants),
        candidates=[
            Candidate(
                id=name,
                stage_cpu_ms=_stage_costs(variants[name]),
                validation=found.validation,
                calibration=found.calibration,
            )
            for name, found in traces.items()
        ],
        validation=work.answers("validation"),
        calibration=work.answers("calibration"),
        self_changed=myself.changed if myself else 0.0,
        cosine_floor=work.config.cosine_floor,
    )


def _stage_costs(variant: VariantManifest) -> tuple[float, ...]:
    found = variant.measured
    assert found is not None
    return tuple(found.stage_cpu_ms) or (found.row_cpu_ms or 0.0,)


def self_disagreement(reference: VariantManifest) -> SelfDisagreement | None:
    found = reference.measured
    if found is None:
        return None
    # Against torch's own answers, in every batching: what the variant of the reference itself changes.
    return SelfDisagreement(
        rows=found.quality.rows,
        changed=max(found.quality.disagreement, found.batching.changed),
        max_difference=max(found.quality.max_difference, found.batching.max_difference),
    )


# On test.


def try_points(
    work: Work, variants: Mapping[str, VariantManifest], points: Sequence[OperatingPoint]
) -> tuple[list[OperatingPoint], dict[str, Floats]]:
    """The points with what `test` says of them, and the values float32 [rows, width] that each gave."""
    if not points:
        return [], {}
    rows, task = work.rows("test"), work.reference.task
    fallback = recipes.ONNX_REFERENCE
    ways = {fallback: whole(variants[fallback]), **{point.id: point.steps for point in points}}
    paths = {name: variant_directory(work.config.out, name) for name in variants}
    with work.progress.step(TRY_POINTS) as report:
        cpu_ms, arrays = measure.try_points(ways, paths, rows, task, work.config.threads, report)
    reference, targets = work.answers("test"), work.targets("test")
    tried = []
    for point in points:
        values = arrays[f"{point.id}.values"]
        wrong = disagreements(values, reference, task, work.config.cosine_floor)
        metric_name, metric = measure.task_metric(values, targets, task)
        outcome = Outcome(
            rows=len(rows),
            errors=int(wrong.sum()),
            disagreement=float(wrong.mean()),
            answered=_answered(point, arrays[f"{point.id}.steps"], arrays[f"{point.id}.stages"]),
            cpu_ms_per_row=cpu_ms[point.id],
            reference_cpu_ms_per_row=cpu_ms[fallback],
            metric_name=metric_name,
            metric=metric,
            scores=score_bins(arrays[f"{point.id}.scores"]) if has_scores(task) else [],
        )
        tried.append(point.model_copy(update={"test": outcome}))
    return tried, {point.id: arrays[f"{point.id}.values"] for point in points}


def _answered(point: OperatingPoint, steps: NDArray[np.int8], stages: NDArray[np.int8]) -> list[list[float]]:
    return [
        [float(((steps == number) & (stages == stage)).mean()) for stage in range(len(step.gates))]
        for number, step in enumerate(point.steps)
    ]


def _by_label(work: Work, values: Mapping[str, Floats]) -> list[LabelDisagreement]:
    task, reference = work.reference.task, work.answers("test")
    changed = {name: disagreements(found, reference, task, work.config.cosine_floor) for name, found in values.items()}
    return label_disagreement(reference, changed, task) if changed else []


# The family.


def restore_dropped(out: Path) -> None:
    """Bring back the files of variants that an earlier run set aside, so that they count as built."""
    for folder in sorted((out / DROPPED_FOLDER).glob("*")):
        target = variant_directory(out, folder.name)
        if (target / MANIFEST_FILE).exists():
            for path in folder.iterdir():
                path.replace(target / path.name)
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(out: Path, variants: Sequence[VariantManifest]) -> None:
    """Move the model files of dropped variants out of the family, where a later run finds them."""
    for variant in variants:
        folder = out / DROPPED_FOLDER / variant.id
        folder.mkdir(parents=True, exist_ok=True)
        for record in variant.files:
            path = variant_directory(out, variant.id) / record.path
            if path.exists():
                path.replace(folder / record.path)


def write_family(
    work: Work, variants: Mapping[str, VariantManifest], not_built: Sequence[NotBuilt], findings: Findings
) -> Family:
    """Drop what is dominated, write `family.json` and then the report, and open the family."""
    used = {step.variant for point in findings.points for step in point.steps}
    default = default_variant(list(variants.values()), recipes.REFERENCE)
    keep = {recipes.REFERENCE, recipes.ONNX_REFERENCE, default, *used}
    worse = dominated({name: Tried.of(variant) for name, variant in variants.items()}, sorted(keep & set(variants)))
    digests = {name: _manifest_digest(work.config.out, name) for name in variants}
    tokenizer = work.config.out / TOKENIZER_FILE
    manifest = FamilyManifest(
        fettle_version=__version__,
        name=work.config.name or default_name(work.config.model),
        source=work.reference.source,
        task=work.reference.task,
        tokenizer=work.reference.tokenizer,
        tokenizer_files=[
            record.model_copy(update={"path": f"{tokenizer.parent.name}/{record.path}"})
            for record in record_files(tokenizer.parent)
        ],
        reference=recipes.REFERENCE,
        default=default,
        data={name: split.record() for name, split in work.splits.by_name.items()},
        hardware=work.hardware,
        variants=[VariantEntry(id=name, manifest_sha256=digests[name]) for name in variants if name not in worse],
        not_built=list(not_built),
        dropped=[
            Dropped(id=name, reason=f"{better} is at least as good in every respect", manifest_sha256=digests[name])
            for name, better in worse.items()
        ],
        cosine_floor=work.config.cosine_floor,
        points=findings.points,
        levels=findings.levels,
        votes=findings.votes,
        self_disagreement=findings.self_disagreement,
        analysis=findings.analysis,
        command=command_of(work),
    )
    write_manifest(work.config.out / FAMILY_FILE, manifest)
    set_aside(work.config.out, [variants[name] for name in worse])
    return Family.open(work.config.out)


def default_variant(variants: Sequence[VariantManifest], reference: str) -> str:
    """The fastest at one typical row among those that answered every row as the reference did, in any batch."""
    speeds = {}
    for variant in variants:
        found = variant.measured
        if found is not None and (variant.id == reference or _exact(found)):
            speeds[variant.id] = estimate_ms(found.latency, 1, found.typical_length)
    return min(speeds, key=speeds.__getitem__, default=reference)


def default_name(model: str) -> str:
    """The model's last path part, with what a name may not hold replaced by dashes."""
    last = Path(model).resolve().name if Path(model).is_dir() else model.rstrip("/").rpartition("/")[2]
    cleaned = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in last)
    return cleaned.lstrip("._-")[:64] or "model"


def command_of(work: Work) -> str:
    """The command that makes this family again, without what has its default."""
    config = work.config
    words = ["fettle", "optimize", config.model]
    for model, names in ((config.files, type(config.files).model_fields), (config, OPTIONS)):
        for name in names:
            value = getattr(model, name)
            if value is None or value == type(model).model_fields[name].default:
                continue
            option = "--" + OPTIONS.get(name, name).replace("_", "-")
            for item in value if isinstance(value, list) else [value]:
                words += [option, str(item)]
    return shlex.join(words)


def _exact(found: Measurements) -> bool:
    return found.quality.disagreement == 0 and found.batching.invariant


def _manifest_digest(out: Path, name: str) -> str:
    return sha256_bytes((variant_directory(out, name) / MANIFEST_FILE).read_bytes())
