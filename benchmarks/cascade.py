"""Int8 with escalation alone, as a family of its own: what a router without Fettle's other levers could promise.

The family is a copy whose only operating point is the int8 variant, then the reference's own weights for what it is
not sure of. The threshold comes from the same search as any other point's, restricted to these two variants: chosen on
`validation`, tested on `calibration`, at the same confidence.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from fettle.answers import Floats
from fettle.config import DataFiles
from fettle.family import FAMILY_FILE, Family, variant_directory, write_manifest
from fettle.manifest import FamilyManifest, VariantManifest
from fettle.store import new_directory, sha256_bytes
from fettle.tokenizer import Tokenizer
from optimize.certify import Candidate, Problem, certify
from optimize.data import load_splits
from optimize.measure import try_rows
from optimize.recipes import ONNX_REFERENCE, TRIMMED
from optimize.tracing import BATCHINGS, batchings
from optimize.trial import Part, TrialRequest

INT8 = "onnx-int8"
DATA = Path("examples/data")
Say = Callable[[str], None]


def escalation_family(
    family: Path, out: Path, say: Say, *, level: float = 0.01, delta: float = 0.05, threads: int = 2
) -> Path:
    """Make the copy below `out`, or find it; a few minutes for ten thousand rows, most of them the reference's own.

    Raises:
        ValueError: the level cannot be certified so.
    """
    opened = Family.open(family)
    made_from = sha256_bytes(f"{(family / FAMILY_FILE).read_bytes()!r} {level} {delta}".encode())
    directory = out / f"escalation-{made_from[:12]}"
    if (directory / FAMILY_FILE).exists():
        return directory
    say("certify int8 with escalation")
    fallback = TRIMMED if TRIMMED in opened.variants else ONNX_REFERENCE
    manifest = opened.manifest
    files = {name: DATA / f"debian-sections.{name}.jsonl.gz" for name in ("validation", "calibration", "test")}
    splits = load_splits(DataFiles.model_validate(files))
    tokenizer = Tokenizer(opened.tokenizer_path, manifest.tokenizer)
    rows = {name: tokenizer.encode(splits[name].texts) for name in ("validation", "calibration")}
    both = [*rows["validation"], *rows["calibration"]]
    cut = len(rows["validation"])

    def answers(variant: VariantManifest, ways: list[str]) -> dict[str, list[Floats]]:
        """By split: the outputs [rows, stages, width] in each batching."""
        say(f"answers of {variant.id} on validation and calibration")
        parts = [
            Part(name=f"{split}-{way}", first=first, last=last, batch=BATCHINGS[way][0], sort=BATCHINGS[way][1])
            for split, first, last in (("validation", 0, cut), ("calibration", cut, len(both)))
            for way in ways
        ]
        path = opened.variant_path(variant.id).resolve()
        found = try_rows(TrialRequest(variant=path, device="cpu", threads=threads, parts=parts), both, lambda _: None)
        return {split: [found[1][f"{split}-{way}"] for way in ways] for split in rows}

    truth = answers(opened.variant(manifest.reference), ["full"])
    candidates = []
    for name in (INT8, fallback):
        variant = opened.variant(name)
        traces = answers(variant, batchings(variant))
        candidates.append(Candidate(name, _costs(variant), traces["validation"], traces["calibration"]))
    problem = Problem(
        task=manifest.task,
        reference=fallback,
        candidates=candidates,
        validation=truth["validation"][0][:, -1],
        calibration=truth["calibration"][0][:, -1],
        cosine_floor=manifest.cosine_floor,
    )
    found = certify(problem, [level], delta)
    if not found.points:
        raise ValueError(f"int8 with escalation: {found.levels[0].reason}")
    copy_family(opened, directory, manifest.model_copy(update={"points": found.points, "levels": found.levels}))
    return directory


def copy_family(opened: Family, out: Path, manifest: FamilyManifest) -> None:
    """The family's files with another manifest; only the variants that its points use, its reference and default."""
    used = {manifest.reference, manifest.default, *(s.variant for point in manifest.points for s in point.steps)}
    entries = [entry for entry in manifest.variants if entry.id in used]
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(out) as new:
        shutil.copytree(opened.tokenizer_path.parent, new / opened.tokenizer_path.parent.name)
        for entry in entries:
            shutil.copytree(opened.variant_path(entry.id), variant_directory(new, entry.id))
        write_manifest(new / FAMILY_FILE, manifest.model_copy(update={"variants": entries, "dropped": []}))


def _costs(variant: VariantManifest) -> tuple[float, ...]:
    found = variant.measured
    if found is None:
        raise ValueError(f"{variant.id} was not measured; run `fettle optimize` again")
    return tuple(found.stage_cpu_ms) or (found.row_cpu_ms or 0.0,)
