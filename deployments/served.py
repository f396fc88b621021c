"""A family as it is served: its tokenizer, a queue for each variant, its menu with the gears, and what is revoked."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from deployments.demand import Demand
from deployments.lane import Queued
from deployments.telemetry import ClassGauges, FamilyGauges, PointGauges, VariantGauges
from deployments.text_writer import extract_of
from fettle import policy
from fettle.config import FamilyConfig, GearConfig
from fettle.costs import row_ms
from fettle.errors import FettleError, UsageError
from fettle.extract import Extract
from fettle.family import Family, check_files
from fettle.gearbox import Gearbox
from fettle.manifest import Task
from fettle.menu import EXACT, Menu
from fettle.points import fingerprint
from fettle.quality import PointState
from fettle.tokenizer import Tokenizer

logger = logging.getLogger("ray.serve.fettle")

PINNED = "pinned"


@dataclass(frozen=True, slots=True)
class Quality:
    """What a request asks for: the largest share of changed answers (0: the reference's own), or one variant."""

    tolerance: float
    asked: str
    variant: str | None = None

    @classmethod
    def of(cls, tolerance: float, asked: str | None = None) -> Quality:
        return cls(tolerance, asked or (f"{tolerance:g}" if tolerance > 0 else EXACT))

    @classmethod
    def pinned_to(cls, variant: str) -> Quality:
        return cls(1.0, PINNED, variant)


@dataclass(slots=True, eq=False)
class ServedFamily:
    """See the module. `default` is the class of requests that name none.

    `sleeps`: a variant that nobody asks may have no replica.
    """

    name: str
    family: Family
    tokenizer: Tokenizer
    batchers: Mapping[str, Queued]
    default: Quality
    gears: GearConfig = field(default_factory=GearConfig)
    sleeps: bool = False
    menu: Menu = field(init=False)
    gearbox: Gearbox = field(init=False)
    demand: Demand = field(init=False)
    extract: Extract | None = field(init=False)
    _revoked: frozenset[str] = frozenset()
    _own_fingerprints: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.extract = extract_of(self.task)
        measured = {name: self.family.variant(name).measured for name in self.batchers}
        starts = {name: found.load_seconds for name, found in measured.items() if found is not None}
        self.demand = Demand(self.batchers, starts)
        self._build_menu()

    @classmethod
    def of(
        cls, settings: FamilyConfig, name: str, family: Family, batchers: Mapping[str, Queued], gears: GearConfig
    ) -> ServedFamily:
        """A family with the default class that its settings amount to.

        Raises:
            IntegrityError, FamilyError: a file of its tokenizer is not what the manifest says.
        """
        for problem in check_files(family.directory, family.manifest.tokenizer_files):
            raise problem
        tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
        return cls(name, family, tokenizer, batchers, default_quality(settings, family), gears)

    @property
    def task(self) -> Task:
        return self.family.manifest.task

    @property
    def context(self) -> int:
        """How many tokens whichever variant answers can take; of a text generator, those that it makes included."""
        decoders = [self.family.variant(name).decoder for name in self.batchers]
        limits = [decoder.context for decoder in decoders if decoder is not None]
        return min([self.family.manifest.tokenizer.max_length, *limits])

    @property
    def models(self) -> list[str]:
        return [self.name, *(f"{self.name}:{variant}" for variant in self.batchers)]

    @property
    def reference(self) -> str | None:
        """The reference's id where it is served."""
        name = self.family.manifest.reference
        return name if name in self.batchers else None

    @property
    def is_ready(self) -> bool:
        """Whether whatever answers a request that names no class takes work, or comes back when it is asked."""
        if self.sleeps:
            return True
        if self.default.variant is not None:
            return self.batchers[self.default.variant].is_ready
        ways = self.menu.gears(self.default.tolerance)
        return all(self.batchers[variant].is_ready for way in ways for variant in way.variants)

    def is_calm(self) -> bool:
        """Whether nothing presses, so that rows below INTERACTIVE may fill gaps."""
        backlog = max(batcher.backlog_s for batcher in self.batchers.values())
        return backlog * 1000 < self.gears.down * self.gears.objective_ms

    def level_name(self, quality: Quality) -> str:
        """The class as it is counted: by the certified level that a tolerance amounts to."""
        if quality.variant is not None:
            return PINNED
        return level_name(self.menu.level(quality.tolerance))

    def learn(self, states: Collection[PointState]) -> None:
        """Take over what the monitor says of this family's points; certificates that are new are read from the disk."""
        mine = [state for state in states if state.family == self.name]
        # Latched here as well: whatever the monitor says later, these certificates never come back, only new ones.
        revoked = self._revoked | {state.fingerprint for state in mine if state.status == "revoked"}
        known = frozenset(state.fingerprint for state in mine)
        changed = revoked != self._revoked
        if not known <= self._own_fingerprints:
            changed = self._reload() or changed
        if changed:
            self._tell_revoked(mine)
            self._revoked = revoked
            self._build_menu()

    def _tell_revoked(self, states: Collection[PointState]) -> None:
        for state in states:
            if state.status == "revoked" and state.fingerprint not in self._revoked:
                facts = {"kind": "revoked", "family": self.name, "point": state.point, "compared": str(state.shadows)}
                logger.warning("an operating point is revoked", extra=facts | {"changed": str(state.disagreements)})

    def gauges(self) -> FamilyGauges:
        """What is so now, for the live page."""
        return FamilyGauges(
            name=self.name,
            task=self.task.kind.value,
            reference=self.family.manifest.reference,
            objective_ms=self.gears.objective_ms,
            shift_up=self.gears.up,
            shift_down=self.gears.down,
            classes=[self._class_gauges(level) for level in (0.0, *self.menu.levels)],
            variants=[self._variant_gauges(name, batcher) for name, batcher in self.batchers.items()],
            points=[
                PointGauges(
                    id=point.id,
                    alpha=point.certificate.alpha,
                    upper_bound=point.certificate.upper_bound,
                    steps=[(step.variant, len(step.gates)) for step in point.steps],
                )
                for point in self.family.manifest.points
            ],
        )

    def _class_gauges(self, level: float) -> ClassGauges:
        gear = self.gearbox.gear(level)
        names = [way.name for way in self.menu.gears(level)] if level or self.reference else []
        return ClassGauges(level_name(level), level, names, gear.number, round(gear.pressure, 4))

    def _variant_gauges(self, name: str, batcher: Queued) -> VariantGauges:
        return VariantGauges(
            id=name,
            stages=batcher.stages,
            replicas=batcher.slots.replicas,
            queued=batcher.depth,
            backlog_s=round(batcher.backlog_s, 4),
            rows=batcher.stats.rows,
            batches=batcher.stats.batches,
            busy_ms=round(batcher.stats.infer_ms, 3),
        )

    def _reload(self) -> bool:
        """Read new certificates for the same variants; whether there are any.

        A family that was rebuilt needs a restart, and goes on as it was.
        """
        try:
            found = Family.open(self.family.directory)
        except FettleError as error:
            logger.warning("the changed family %s cannot be read, the old one stays: %s", self.name, error)
            return False
        if found.manifest.variants != self.family.manifest.variants:
            logger.warning("family %s was rebuilt; restart the service to serve it as it is now", self.name)
            return False
        if found.manifest.points == self.family.manifest.points:
            # The monitor has seen what is not here yet; gears stay where they are.
            return False
        self.family = found
        return True

    def _build_menu(self) -> None:
        self._own_fingerprints = frozenset(fingerprint(point) for point in self.family.manifest.points)
        self.menu = Menu(self.family, self.batchers, self._revoked)
        self.gearbox = Gearbox(self.menu, self.batchers, self.gears, self.name)
        self.gearbox.tick(time.monotonic())


def level_name(level: float) -> str:
    return f"{100 * level:g} %" if level > 0 else EXACT


def default_quality(settings: FamilyConfig, family: Family) -> Quality:
    """What a request gets that names no class: the configured variant, else the configured class.

    A family without any certificate has no class but exact: there its default variant answers, the fastest that gave
    the reference's answer on every row of `test`.
    """
    if settings.default is not None:
        return Quality.pinned_to(settings.default)
    if not family.manifest.points:
        return Quality.pinned_to(family.manifest.default)
    return Quality.of(0.0 if settings.max_disagreement == EXACT else float(settings.max_disagreement))


def served_variants(settings: FamilyConfig, family: Family) -> list[str]:
    """What the configuration names, and its default variant; or all that the certified points and `exact` need.

    A family without points has the variants on its measured frontier, the reference and its default variant.

    Raises:
        UsageError: one of them was not measured, so that its costs are unknown; or no variant answers by default.
    """
    manifest = family.manifest
    default = [settings.default] if settings.default else ([] if manifest.points else [manifest.default])
    if settings.variants is not None:
        names = settings.variants
    elif manifest.points:
        names = [manifest.reference, *(step.variant for point in manifest.points for step in point.steps)]
    else:
        names = [manifest.reference, *_frontier(family)]
    chosen = list(dict.fromkeys([*default, *names]))
    for name in chosen:
        if family.variant(name).measured is None:
            raise UsageError(
                f"variant {name!r} of family {family.name!r} was not measured; run `fettle optimize` again"
            )
    return chosen


def _frontier(family: Family) -> list[str]:
    points = {}
    for name, variant in family.variants.items():
        if variant.measured is not None:
            points[name] = (row_ms(variant), variant.measured.quality.disagreement)
    return policy.frontier(points)
