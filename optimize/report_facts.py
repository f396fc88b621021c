"""What the report shows, gathered from the manifests of a family: each variant that was tried, its lever, its cost.

Reads manifests only. A dropped variant counts as long as its manifest lies where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fettle.errors import FamilyError
from fettle.family import MANIFEST_FILE, Family, check_hash, parse_manifest, variant_directory
from fettle.latency import best_rows_per_second
from fettle.manifest import (
    FamilyManifest,
    Level,
    Measurements,
    OperatingPoint,
    PassRecord,
    Precision,
    Runtime,
    VariantManifest,
)

PREFERRED_LEVEL = 0.01


class Lever(StrEnum):
    """What made a variant cheaper. A variant with several passes is filed under the first of these that it has."""

    REFERENCE = "reference"
    EXITS = "exits"
    PRUNED = "pruned"
    RESHAPED = "reshaped"
    DISTILLED = "distilled"
    QUANTIZED = "quantized"
    HARDWARE = "hardware"


# By the beginning of a pass's name. Distillation follows most changes of shape to heal them, and quantization comes
# on top of both, so what is filed under these two had nothing else done to it.
STEMS = {
    Lever.EXITS: ("exit",),
    Lever.PRUNED: ("prun", "drop", "spars"),
    Lever.RESHAPED: ("reshap", "shar", "factor", "narrow", "width"),
    Lever.DISTILLED: ("distil", "alternate"),
    Lever.QUANTIZED: ("quant", "smooth"),
}


@dataclass(frozen=True, slots=True)
class Tried:
    """A variant that was built. `cost`: ms a row, None if not measured. `dropped`: why it is not in the family."""

    manifest: VariantManifest
    lever: Lever
    cost: float | None
    dropped: str | None = None

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def disagreement(self) -> float | None:
        return None if self.manifest.measured is None else self.manifest.measured.quality.disagreement

    @property
    def build_seconds(self) -> float:
        return sum(record.seconds for record in self.manifest.recipe)


@dataclass(frozen=True, slots=True)
class Facts:
    """`baseline` is the variant that costs are compared with: the original's weights on ONNX Runtime in float32.

    `processor_time`: costs are measured processor time; where no variant has it, the engine's own time in its best
    batch stands in for it.
    """

    manifest: FamilyManifest
    tried: dict[str, Tried]
    baseline: Tried
    processor_time: bool

    @property
    def cost_name(self) -> str:
        return "processor time" if self.processor_time else "engine time in the best batch"

    @property
    def cost_unit(self) -> str:
        return "CPU ms per row" if self.processor_time else "ms per row"

    @property
    def measurements(self) -> list[Measurements]:
        return [item.manifest.measured for item in self.tried.values() if item.manifest.measured is not None]

    def speed_up(self, tried: Tried) -> float | None:
        """How many times less than the baseline it takes."""
        return _ratio(self.baseline.cost, tried.cost)

    def speed_up_over_parent(self, tried: Tried) -> float | None:
        parent = self.parent(tried)
        return None if parent is None else _ratio(parent.cost, tried.cost)

    def parent(self, tried: Tried) -> Tried | None:
        return self.tried.get(tried.manifest.parent or "")

    def lineage(self, tried: Tried) -> list[Tried]:
        """From the reference down to the variant itself."""
        chain = [tried]
        while (parent := self.parent(chain[0])) is not None and parent not in chain:
            chain.insert(0, parent)
        return chain

    def point(self, level: Level) -> OperatingPoint | None:
        return next((point for point in self.manifest.points if point.id == level.point), None)

    def levels_of(self, point: OperatingPoint) -> list[float]:
        """The levels that the point may be served at; its own certificate's if no level names it."""
        named = [level.alpha for level in self.manifest.levels if level.point == point.id]
        return sorted(named) or [point.certificate.alpha]

    @property
    def best_point(self) -> OperatingPoint | None:
        """What the head of the report speaks of: the point at 1 %, or at the next level that has one."""
        certified = sorted(
            (alpha, index) for index, point in enumerate(self.manifest.points) for alpha in self.levels_of(point)
        )
        chosen = [pair for pair in certified if pair[0] >= PREFERRED_LEVEL] or certified[-1:]
        return self.manifest.points[chosen[0][1]] if chosen else None


def gather(family: Family) -> Facts:
    """Read the dropped variants' manifests and derive what the report's parts have in common."""
    kept = list(family.variants.values())
    dropped = _dropped(family)
    everything = [*kept, *(manifest for manifest, _ in dropped)]
    measured = [manifest.measured for manifest in everything if manifest.measured is not None]
    processor_time = any(found.row_cpu_ms is not None for found in measured)
    reference = family.manifest.reference
    tried = {
        manifest.id: Tried(manifest, lever_of(manifest, reference), _cost(manifest, processor_time), why)
        for manifest, why in [*((manifest, None) for manifest in kept), *dropped]
    }
    return Facts(family.manifest, tried, _baseline(tried, reference), processor_time)


def lever_of(manifest: VariantManifest, reference: str) -> Lever:
    """Read from the stages, the passes' names, and the precision where no pass tells."""
    if manifest.id == reference:
        return Lever.REFERENCE
    if manifest.exits:
        return Lever.EXITS
    for lever in STEMS:
        if any(lever_of_pass(record) is lever for record in manifest.recipe):
            return lever
    return Lever.HARDWARE if manifest.precision is Precision.FP32 else Lever.QUANTIZED


def lever_of_pass(record: PassRecord) -> Lever | None:
    return next((lever for lever, stems in STEMS.items() if record.name.lower().startswith(stems)), None)


def _dropped(family: Family) -> list[tuple[VariantManifest, str]]:
    found = []
    for item in family.manifest.dropped:
        try:
            path = variant_directory(family.directory, item.id) / MANIFEST_FILE
            check_hash(path, item.manifest_sha256)
            found.append((parse_manifest(path, VariantManifest), item.reason))
        except FamilyError:
            # Its name and the reason are in the family's own manifest; only the figures are lost.
            continue
    return found


def _cost(manifest: VariantManifest, processor_time: bool) -> float | None:
    found = manifest.measured
    if found is None:
        return None
    return found.row_cpu_ms if processor_time else 1000 / best_rows_per_second(found.latency, found.typical_length)


def _baseline(tried: dict[str, Tried], reference: str) -> Tried:
    for item in tried.values():
        manifest = item.manifest
        same_weights = item.lever is Lever.HARDWARE and manifest.parent in (reference, None)
        if same_weights and manifest.runtime is Runtime.ONNX and manifest.precision is Precision.FP32:
            return item
    return tried[reference]


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
