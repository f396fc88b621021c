"""When a new version of a family gets more of the requests, all of them, or none any more: pure functions of counts.

A rollout sends a share of the requests, drawn by chance, to a new version, in steps. It is rolled back by evidence that
the new version fails more often than the old one, is slower than it by more than a stated factor, or gives other
answers than it promises. Each test is an e-process (see `fettle.evidence`), so it may be looked at after every report.

Failures and slow answers are compared between the versions: had both the same risk, each such event would have happened
at the new version with probability `share`, whatever the load does to both. So the label of each event is a toss of a
known coin, and a gambler bets that the new version has 2, 4 or 10 times the old one's risk. Wrong answers are bets
against the level that was promised (`fettle.evidence.log_evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import Field

from fettle.config import RolloutConfig
from fettle.evidence import log_evidence
from fettle.manifest import FamilyManifest, Head
from fettle.schema import Strict

# How many times the old version's risk the new one's is bet to be.
RATIOS = (2.0, 4.0, 10.0)
# Failures, slow answers, broken promises, disagreement between the versions.
TESTS = 4
# Evidence of so much does not roll back, but nothing goes on before it has fallen again.
DOUBT = 10.0
# The level of an answer that is the reference's own: two engines that do the same sums may differ in the last digit.
EXACT_LEVEL = 0.001

Status = Literal["starting", "running", "promoted", "rolled back"]


class Side(Strict):
    """What one version did. `slow`: see `Trial` in `deployments.trial`."""

    requests: int = Field(default=0, ge=0)
    failed: int = Field(default=0, ge=0)
    slow: int = Field(default=0, ge=0)

    def __add__(self, other: Side) -> Side:
        return Side(
            requests=self.requests + other.requests, failed=self.failed + other.failed, slow=self.slow + other.slow
        )


class Compared(Strict):
    """Answers of the new version, compared with those of the old one's reference."""

    rows: int = Field(default=0, ge=0)
    differing: int = Field(default=0, ge=0)

    def __add__(self, other: Compared) -> Compared:
        return Compared(rows=self.rows + other.rows, differing=self.differing + other.differing)


class Tally(Strict):
    """What was seen during one step. `promised`: comparisons by the level that the answer was promised at."""

    old: Side = Side()
    new: Side = Side()
    promised: dict[float, Compared] = {}
    compared: Compared = Compared()

    def __add__(self, other: Tally) -> Tally:
        levels = {*self.promised, *other.promised}
        nothing = Compared()
        return Tally(
            old=self.old + other.old,
            new=self.new + other.new,
            promised={
                level: self.promised.get(level, nothing) + other.promised.get(level, nothing) for level in levels
            },
            compared=self.compared + other.compared,
        )


class Position(Strict):
    """Where a rollout stands. `since`: Unix seconds of the last change; `reason`: why it ended."""

    status: Status = "starting"
    step: int = Field(default=0, ge=0)
    since: float
    reason: str = ""

    @property
    def over(self) -> bool:
        return self.status in ("promoted", "rolled back")


class Findings(Strict):
    """Evidence against the new version, one figure a test; 1 is none, `alarm_at` ends the rollout."""

    failures: float
    slowness: float
    promises: float
    disagreement: float
    alarm_at: float

    @property
    def worst(self) -> float:
        return max(self.failures, self.slowness, self.promises, self.disagreement)


def comparable(old: FamilyManifest, new: FamilyManifest) -> bool:
    """Whether an answer of the new version can be compared with one of the old: same rows in, same labels out.

    How far two numbers of a regression may differ is not recorded with a family.
    """
    return (
        old.task.head is not Head.REGRESSION
        and (old.task.width, old.task.labels) == (new.task.width, new.task.labels)
        and old.tokenizer_files == new.tokenizer_files
    )


def share_of(position: Position, config: RolloutConfig) -> float:
    """The share of the requests that the new version gets."""
    match position.status:
        case "running":
            return config.steps[position.step]
        case "promoted":
            return 1.0
    return 0.0


def findings(tallies: Mapping[int, Tally], config: RolloutConfig, *, same_reference: bool) -> Findings:
    """The evidence in what was seen, by step.

    Promises are judged where the reference is the same: a reference that was changed on purpose answers differently.
    """
    known = [(config.steps[step], tally) for step, tally in tallies.items()]
    whole = sum(tallies.values(), Tally())
    promises = 0.0
    if same_reference and whole.promised:
        # One test for each level, averaged, so that they are one test again.
        logs = [
            float(log_evidence(each.differing, each.rows, min(level, 0.999))) for level, each in whole.promised.items()
        ]
        promises = _log_mean(logs)
    disagreement = 0.0
    if config.max_disagreement is not None:
        disagreement = float(log_evidence(whole.compared.differing, whole.compared.rows, config.max_disagreement))
    return Findings(
        failures=_exp(log_excess((share, tally.old.failed, tally.new.failed) for share, tally in known)),
        slowness=_exp(log_excess((share, tally.old.slow, tally.new.slow) for share, tally in known)),
        promises=_exp(promises),
        disagreement=_exp(disagreement),
        alarm_at=TESTS / config.delta,
    )


def log_excess(events: Iterable[tuple[float, int, int]]) -> float:
    """The logarithm of the evidence that events are more frequent at the new version than at the old one.

    `events`: (share of the requests that the new version got, events at the old one, events at the new one).
    If the new version's risk is r times the old one's, an event is the new one's with probability
    q = share r / (share r + 1 - share); the capital is multiplied by q / share, or by (1 - q) / (1 - share).
    """
    seen = list(events)
    logs = []
    for ratio in RATIOS:
        capital = 0.0
        for share, old, new in seen:
            chance = share * ratio / (share * ratio + 1 - share)
            capital += new * math.log(chance / share) + old * math.log((1 - chance) / (1 - share))
        logs.append(capital)
    return _log_mean(logs)


def decide(
    position: Position,
    tallies: Mapping[int, Tally],
    now: float,
    config: RolloutConfig,
    *,
    same_reference: bool,
    compares: bool,
    ready: bool = True,
    failure: str | None = None,
) -> Position:
    """Where the rollout stands after what was seen.

    Args:
        ready: every router has replicas of the new version that take work.
        failure: what Ray says of a new replica that does not start.
        compares: answers can be compared with the old reference's.
    """
    if position.over:
        return position
    if failure is not None:
        return _ended(position, "rolled back", now, f"load failure: {failure}")
    if position.status == "starting":
        if ready:
            return position.model_copy(update={"status": "running", "since": now})
        if now - position.since > config.ready_within_s:
            reason = f"load failure: not every replica was ready within {config.ready_within_s:g} s"
            return _ended(position, "rolled back", now, reason)
        return position
    found = findings(tallies, config, same_reference=same_reference)
    if found.worst >= found.alarm_at:
        return _ended(position, "rolled back", now, _complaint(found, tallies, config))
    if not _is_enough(position, tallies, now, config, judged=compares and _judges(config, same_reference)):
        return position
    if found.worst >= DOUBT:
        return position
    if position.step + 1 < len(config.steps):
        return position.model_copy(update={"step": position.step + 1, "since": now})
    return _ended(position, "promoted", now, "every step passed")


def _judges(config: RolloutConfig, same_reference: bool) -> bool:
    return same_reference or config.max_disagreement is not None


def _is_enough(
    position: Position, tallies: Mapping[int, Tally], now: float, config: RolloutConfig, *, judged: bool
) -> bool:
    """Whether this step has seen what it is there for."""
    here = tallies.get(position.step, Tally())
    if now - position.since < config.hold_s or here.new.requests < config.min_requests:
        return False
    compared = sum((tally.compared.rows for tally in tallies.values()), 0)
    return not judged or config.shadow == 0 or compared >= config.min_compared


def _complaint(found: Findings, tallies: Mapping[int, Tally], config: RolloutConfig) -> str:
    whole = sum(tallies.values(), Tally())
    old, new, compared = whole.old, whole.new, whole.compared
    texts = {
        "failures": f"errors: {new.failed} of {new.requests} requests failed, "
        f"{old.failed} of {old.requests} at the old version",
        "slowness": f"latency: {new.slow} of {new.requests} requests took more than {config.slower:g} times the old "
        f"version's 90th percentile, where {old.slow} of {old.requests} of its own exceeded that",
        "promises": f"wrong answers: {compared.differing} of {compared.rows} differ from the reference's, "
        f"more than was promised ({_by_level(whole)})",
        "disagreement": f"wrong answers: {compared.differing} of {compared.rows} differ from the old version's, "
        f"more than max_disagreement {config.max_disagreement}",
    }
    worst = max(texts, key=lambda name: float(getattr(found, name)))
    return f"{texts[worst]}; evidence {getattr(found, worst):.3g}, the limit is {found.alarm_at:g}"


def _by_level(tally: Tally) -> str:
    return ", ".join(
        f"at {100 * level:g} %: {each.differing} of {each.rows}" for level, each in sorted(tally.promised.items())
    )


def _ended(position: Position, status: Status, now: float, reason: str) -> Position:
    return position.model_copy(update={"status": status, "since": now, "reason": reason})


def _log_mean(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(math.fsum(math.exp(each - top) for each in logs) / len(logs))


def _exp(logarithm: float) -> float:
    return math.exp(min(logarithm, 690.0))
