"""What the labels ought to be, and which replies have others: the reference's own answers, computed without a server.

They are computed once for a family and a file of texts, and kept in `build/`.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import bdtrc

from fettle.bench.samples import Samples
from fettle.bench.texts import read_texts, shuffled
from fettle.bench.traffic import Flow
from fettle.family import Family
from fettle.store import sha256_bytes, write_atomic

CACHE = Path("build/benchmark-answers")
# A bound is printed with so many digits at least.
PRECISION = 1e-4
BY_CHANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Agreement:
    """`rows` answers were compared with the reference's, and `changed` of them are others."""

    rows: int
    changed: int

    @property
    def share(self) -> float:
        return self.changed / max(1, self.rows)


def reference_labels(family: Path, texts: Path, threads: int) -> list[str]:
    """What the reference answers, in the order of the file; a minute for some thousand texts, once."""
    found = Family.open(family)
    reference = found.variant(found.manifest.reference)
    made_from = sha256_bytes(f"{[file.sha256 for file in reference.files]} {sha256_bytes(texts.read_bytes())}".encode())
    path = CACHE / f"{made_from[:16]}.json"
    if path.exists():
        return list(json.loads(path.read_bytes()))
    # In a process that ends, so that no torch pool stays behind.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        labels = pool.submit(_predict, family, read_texts(texts), threads).result()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(labels).encode())
    return labels


def compare(samples: Samples, labels: Sequence[str], seed: int) -> dict[str, Agreement]:
    """By flow: the good replies against `labels`, which are in the order of the file that was sent with `seed`."""
    # The same shuffle as the texts'.
    expected = np.array(shuffled(labels, seed), object)[samples.text]
    changed = samples.good & (samples.answer != expected)
    counts = {tag: (samples.good & samples.of(tag), samples.of(tag)) for tag in samples.tags}
    return {tag: Agreement(int(good.sum()), int((changed & mine).sum())) for tag, (good, mine) in counts.items()}


def outside_class(samples: Samples, flows: Sequence[Flow], reference: str) -> list[str]:
    """Good replies that left their class, in words: `exact` by another variant, or a bound above what was asked.

    The samples must have the headers x-fettle-bound, x-fettle-variant and x-fettle-degraded.
    """
    broken = []
    for flow in flows:
        mine = samples.where(samples.of(flow.tag) & samples.good)
        bounds, variants = mine.headers["x-fettle-bound"], mine.headers["x-fettle-variant"]
        if flow.max_disagreement == "exact":
            wrong = (bounds != "exact") | (variants != reference)
            what = "not from the reference"
        else:
            asked = 1.0 if flow.max_disagreement is None else float(flow.max_disagreement)
            wrong = np.array([_bound(bound) > asked + PRECISION for bound in bounds], bool)
            what = "with a bound above the class"
        degraded = mine.headers["x-fettle-degraded"] == "true"
        for mask, words in ((wrong, what), (degraded, "degraded without being asked")):
            if mask.any():
                first = int(np.flatnonzero(mask)[0])
                shown = f"{variants[first]}, bound {bounds[first]!r}"
                broken.append(f"{int(mask.sum())} replies of class {flow.tag} {words} (such as {shown})")
    return broken


def above_bound(found: Mapping[str, Agreement], bounds: Mapping[str, float], *, sampled: bool = False) -> list[str]:
    """Flows that changed more answers than was promised, in words; a flow without an entry was promised nothing.

    With `sampled`, texts were drawn at random, and more than that only counts where chance explains it once in a
    thousand times.
    """
    broken = []
    for tag, bound in bounds.items():
        rows, changed = found[tag].rows, found[tag].changed
        if changed <= (bound + PRECISION) * rows:
            continue
        # P(Bin(rows, bound) >= changed)
        if sampled and bound > 0 and float(bdtrc(changed - 1, rows, bound)) > BY_CHANCE:
            continue
        share = found[tag].share
        broken.append(f"class {tag}: {changed} of {rows} answers changed ({share:.2%}), promised were {bound:.2%}")
    return broken


def _bound(header: str) -> float:
    """As a share; what promises nothing may be anything."""
    if header == "exact":
        return 0.0
    try:
        return float(header)
    except ValueError:
        return 1.0


def _predict(family: Path, texts: list[str], threads: int) -> list[str]:
    import fettle

    with fettle.load(family, threads=threads) as local:
        return [str(prediction.answer) for prediction in local.predict(texts, "exact")]
