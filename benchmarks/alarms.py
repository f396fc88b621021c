"""What the monitor's test does with the pairs that it has seen, replayed from its store; and a family that goes wrong.

The store is read after the service has stopped, or beside it; nothing is written.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fettle import certificates
from fettle.evidence import log_evidence
from fettle.family import FAMILY_FILE, Family, write_manifest
from fettle.manifest import Gate, OperatingPoint, Step

CERTIFIED_ROWS, CERTIFIED_ERRORS, LEVEL, DELTA = 5000, 35, 0.01, 0.05


@dataclass(frozen=True, slots=True)
class Stops:
    """`counts`: pairs from a fresh start to the alarm, over and over along all pairs; `disagreement` of all of them."""

    counts: Sequence[int]
    disagreement: float
    pairs: int

    @property
    def mean(self) -> float:
        return sum(self.counts) / len(self.counts) if self.counts else math.inf


def stopping(directory: Path, point: str, alpha: float, delta: float) -> Stops:
    """Replay the test over a point's pairs, in the order in which they came in; after an alarm it starts afresh."""
    return replayed(_pairs(directory, point), alpha, delta)


def replayed(differs: Sequence[bool], alpha: float, delta: float) -> Stops:
    counts, rows, errors = [], 0, 0
    for wrong in differs:
        rows, errors = rows + 1, errors + wrong
        # The evidence only rises at a difference.
        if wrong and float(log_evidence(errors, rows, alpha)) >= -math.log(delta):
            counts.append(rows)
            rows, errors = 0, 0
    return Stops(counts, sum(differs) / max(1, len(differs)), len(differs))


def _pairs(directory: Path, point: str) -> list[bool]:
    """From whichever store below the directory has pairs of the point."""
    joined = "pairs JOIN points ON pairs.point = points.number"
    question = f"SELECT differs FROM {joined} WHERE points.point = ? ORDER BY pairs.number"
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or not path.read_bytes()[:16].startswith(b"SQLite format 3"):
            continue
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            found = [bool(differs) for (differs,) in connection.execute(question, (point,))]
        finally:
            connection.close()
        if found:
            return found
    return []


def corrupted_family(directory: Path, every: int) -> tuple[Family, list[str]]:
    """Fake engines: an original and a cheap variant that is wrong on one row in `every`, certified at 1 % all the same.

    Returns the family and words that its tokenizer knows.
    """
    from tests.fakes import WORDS, FakeVariant, make_fake_family

    variants = (FakeVariant("original", ms_per_call=2.0), FakeVariant("cheap", ms_per_call=0.5, corrupt_every=every))
    family = make_fake_family(directory, name="fake", variants=variants)
    certificate = certificates.certify(CERTIFIED_ERRORS, CERTIFIED_ROWS, LEVEL, DELTA)
    point = OperatingPoint(
        id="within-0.01",
        steps=[Step(variant="cheap", gates=[Gate(threshold=0.0)])],
        certificate=certificate,
        expected_cpu_ms=0.1,
        tuned_disagreement=CERTIFIED_ERRORS / CERTIFIED_ROWS,
    )
    write_manifest(directory / FAMILY_FILE, family.manifest.model_copy(update={"points": [point]}))
    words = [word for word in WORDS if word not in ("poison", "crash")]
    return Family.open(directory), words
