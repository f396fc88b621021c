"""The outputs of variants on the splits that thresholds are tuned and certificates are made on, kept in the cache.

A variant whose answers depend on the batch is traced in several batchings, since a certificate has to hold in the
worst of them. Several processes run at once where the cores allow; nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from fettle.answers import Floats
from fettle.errors import PassError
from fettle.family import variant_directory
from fettle.machine import usable_cores
from fettle.manifest import VariantManifest
from fettle.rows import Row
from optimize import measure
from optimize.trial import Part, TrialRequest
from optimize.workspace import Work, fingerprint_of

# (rows a call, by length or as they come) of each batching.
BATCHINGS: Final = {"alone": (1, False), "mixed": (32, False), "full": (64, True)}
STEP = "answers of the variants on validation and calibration"


@dataclass(frozen=True, slots=True)
class Traces:
    """Outputs float32 [rows, stages, width] of one variant, one array for each batching."""

    validation: list[Floats]
    calibration: list[Floats]


def trace_all(work: Work, variants: Sequence[VariantManifest]) -> dict[str, Traces]:
    """Trace these variants; one that fails is left out and said."""
    rows = [*work.rows("validation"), *work.rows("calibration")]
    fingerprints = {variant.id: _fingerprint(work, variant) for variant in variants}
    fresh = [v for v in variants if not work.cache.has_arrays(_name(v), fingerprints[v.id])]
    found: dict[str, Traces] = {}
    if not fresh:
        work.progress.skip(STEP, "already there")
        return {variant.id: _cached(work, variant, fingerprints[variant.id], rows) for variant in variants}
    done = dict.fromkeys((variant.id for variant in fresh), 0.0)
    with work.progress.step(STEP) as report:

        def trace(variant: VariantManifest) -> tuple[str, Traces | PassError]:
            def mine(share: float) -> None:
                done[variant.id] = share
                report(sum(done.values()) / len(done))

            try:
                return variant.id, _cached(work, variant, fingerprints[variant.id], rows, mine)
            except PassError as error:
                return variant.id, error

        with ThreadPoolExecutor(max(1, usable_cores() // work.config.threads)) as pool:
            results = dict(pool.map(trace, variants))
    for name, result in results.items():
        if isinstance(result, PassError):
            work.progress.warn(f"{name} is left out of the operating points: {result.message}")
        else:
            found[name] = result
    return found


def batchings(variant: VariantManifest) -> list[str]:
    """Which batchings a certificate has to be made in."""
    found = variant.measured
    return ["mixed"] if found is not None and found.batching.invariant else list(BATCHINGS)


def _cached(
    work: Work,
    variant: VariantManifest,
    fingerprint: str,
    rows: list[Row],
    report: measure.Report = lambda _: None,
) -> Traces:
    count = len(work.rows("validation"))
    names = batchings(variant)

    def compute() -> dict[str, Floats]:
        parts = [
            Part(name=f"{split}-{name}", first=first, last=last, batch=BATCHINGS[name][0], sort=BATCHINGS[name][1])
            for split, first, last in (("validation", 0, count), ("calibration", count, len(rows)))
            for name in names
        ]
        request = TrialRequest(
            variant=variant_directory(work.config.out, variant.id).resolve(),
            device="cpu",
            threads=work.config.threads,
            parts=parts,
        )
        return measure.try_rows(request, rows, report)[1]

    arrays = work.cache.arrays(_name(variant), fingerprint, compute)
    return Traces(
        validation=[arrays[f"validation-{name}"] for name in names],
        calibration=[arrays[f"calibration-{name}"] for name in names],
    )


def _name(variant: VariantManifest) -> str:
    return f"traces/{variant.id}"


def _fingerprint(work: Work, variant: VariantManifest) -> str:
    return fingerprint_of(
        variant=variant.fingerprint,
        batchings=batchings(variant),
        splits={name: [work.splits[name].sha256, len(work.rows(name))] for name in ("validation", "calibration")},
        seed=work.config.seed,
        threads=work.config.threads,
        hardware=work.hardware.model_dump(mode="json"),
    )
