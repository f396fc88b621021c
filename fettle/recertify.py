"""A new certificate for an operating point, from the pairs that the monitor collected in production.

Whoever asks for a certificate again and again, or watches the figures and asks when they look good, has several
chances, and a test for a number of rows that was fixed beforehand would not keep its word: a point that breaks its
promise by a hair passes the binomial test at some moment in one of four cases, and splitting delta over the attempts
does not help against who only asks at a good moment. Here the test is on evidence that holds at any time
(`fettle.evidence.log_evidence_below`): over all moments, attempts and levels together, a promise that is not kept is
made with probability delta at most. So attempts are neither counted nor rationed.

After an alarm only pairs count that came since (`fettle.quality.Tally.for_certificate`). The new certificate gives the
point a new fingerprint, with which its evidence starts anew.

Changes `family.json` and nothing else; a running service finds the change by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fettle.errors import QualityError, UsageError
from fettle.evidence import bound_at_any_time, log_evidence_below, pairs_needed
from fettle.family import FAMILY_FILE, Family, write_manifest
from fettle.manifest import Certificate, FamilyManifest, Level, OperatingPoint
from fettle.points import fingerprint
from fettle.quality import QualityStore, Tally, store_path
from fettle.store import locked


@dataclass(frozen=True, slots=True)
class Recertified:
    """The point with its new certificate, and the one that it had."""

    point: OperatingPoint
    before: Certificate
    since_alarm: bool


def recertify(
    directory: Path,
    *,
    point: str | None = None,
    max_disagreement: float | None = None,
    quality: Path | None = None,
    name: str | None = None,
) -> Recertified:
    """Certify a point anew and write it to `family.json`.

    Args:
        point: its id; by default the one that is revoked, or the only one.
        max_disagreement: the level to certify; by default that of the certificate so far.
        quality: where the monitor keeps its evidence (`monitor.directory`), if not in the family's directory.
        name: the name under which the family is served, if not its own.

    Raises:
        BusyError: another run writes the family.
        FamilyError: it cannot be read.
        UsageError: no such point, or no such level.
        QualityError: there are no pairs, or they do not suffice; says how many it would take.
    """
    # Checked before the lock makes a directory of a mistyped name.
    Family.open(directory)
    with locked(directory):
        family = Family.open(directory)
        store = QualityStore(store_path(directory, name or family.name, quality), read_only=True)
        try:
            chosen, tally = _choose(family.manifest.points, point, store)
        finally:
            store.close()
        alpha = chosen.certificate.alpha if max_disagreement is None else max_disagreement
        _check_level(family.manifest, alpha)
        certificate = certify_pairs(chosen, tally, alpha)
        manifest = with_certificate(family.manifest, chosen.id, certificate)
        write_manifest(directory / FAMILY_FILE, manifest)
    made = next(item for item in manifest.points if item.id == chosen.id)
    return Recertified(made, chosen.certificate, tally.revoked_at is not None)


def certify_pairs(point: OperatingPoint, tally: Tally, alpha: float) -> Certificate:
    """The certificate that these pairs allow, at the confidence of the one so far.

    Raises:
        QualityError: they are too few, or too many of them differ.
    """
    errors, rows = tally.for_certificate
    before = point.certificate
    evidence = float(log_evidence_below(errors, rows, alpha))
    if not rows or evidence < -math.log(before.delta):
        raise QualityError(_refusal(point, tally, alpha))
    return Certificate(
        alpha=alpha,
        delta=before.delta,
        rows=rows,
        errors=errors,
        p_value=math.exp(-evidence),
        # Never above the level that was just passed, whatever the last digit of the search for it.
        upper_bound=min(alpha, bound_at_any_time(errors, rows, before.delta)),
        batchings="any" if before.batchings == "any" else "as served",
        source="traffic",
    )


def with_certificate(manifest: FamilyManifest, name: str, certificate: Certificate) -> FamilyManifest:
    """The family with another certificate for one point, and levels that name the point only where it is certified."""
    points = [
        point.model_copy(update={"certificate": certificate}) if point.id == name else point
        for point in manifest.points
    ]
    levels = [_without(level, name, certificate) for level in manifest.levels]
    own = next((level for level in levels if level.alpha == certificate.alpha), None)
    if own is None:
        levels.append(Level(alpha=certificate.alpha, point=name))
    elif own.point is None:
        filled = own.model_copy(update={"point": name, "reason": None, "rows_needed": None})
        levels = [filled if level is own else level for level in levels]
    return manifest.model_copy(update={"points": points, "levels": sorted(levels, key=lambda level: level.alpha)})


def _without(level: Level, name: str, certificate: Certificate) -> Level:
    if level.point != name or certificate.alpha <= level.alpha:
        return level
    reason = f"{name} was certified anew on pairs from traffic, at {certificate.alpha:.2%}"
    return level.model_copy(update={"point": None, "reason": reason})


def _choose(points: Sequence[OperatingPoint], wanted: str | None, store: QualityStore) -> tuple[OperatingPoint, Tally]:
    tallies = [(point, store.tally(fingerprint(point))) for point in points]
    if wanted is not None:
        found = [(point, tally) for point, tally in tallies if point.id == wanted]
    else:
        found = [(point, tally) for point, tally in tallies if tally.revoked_at is not None] or tallies
    if len(found) == 1:
        return found[0]
    names = ", ".join(point.id for point in points) or "none"
    if wanted is not None:
        raise UsageError(f"the family has no operating point {wanted!r}; it has {names}")
    if not points:
        raise UsageError("the family has no operating points; `fettle optimize` makes them")
    raise UsageError(f"say which point, with --point: one of {', '.join(point.id for point, _ in found)}")


def _check_level(manifest: FamilyManifest, alpha: float) -> None:
    if not 0 < alpha < 1:
        raise UsageError(f"--max-disagreement {alpha:g} is no share between 0 and 1, such as 0.02")
    myself = manifest.self_disagreement
    if myself is not None and myself.changed > alpha:
        raise UsageError(
            f"--max-disagreement {alpha:g} cannot be promised: the reference disagrees with itself on "
            f"{myself.changed:.2%} of the rows, in other batches"
        )


def _refusal(point: OperatingPoint, tally: Tally, alpha: float) -> str:
    errors, rows = tally.for_certificate
    delta = point.certificate.delta
    since = " since the alarm" if tally.revoked_at is not None else ""
    needed = pairs_needed(errors, rows, alpha, delta)
    aim = f"{alpha:.2%} at confidence {1 - delta:.0%}"
    if needed is not None:
        takes = f"it takes about {needed:,} for {aim} if it goes on like that"
    else:
        bound = math.ceil(1000 * bound_at_any_time(errors, rows, delta)) / 1000
        takes = f"at such a rate no number of pairs shows {aim}"
        takes += f"; they allow --max-disagreement {bound:g}" if bound < 1 else ""
    return f"{point.id} is not certified: {errors:,} of {rows:,} pairs{since} differ, and {takes}"
