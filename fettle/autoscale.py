"""How many replicas every deployment should have: pure functions of what is observed and what was decided before.

Enough for the work that comes at a target utilisation, and to drain what waits within a bounded time. Up at once, since
waiting requests pay for every second; down only to what the last minute needed at its height, a part at a time; to
nothing where that is allowed and nobody asks. Knows no Ray: `deployments.autoscaling` brings the observations.

Work is in seconds of one replica, as the router predicts it from latency tables and corrects it by what it sees. Calls
in flight, which Ray's own policy counts, say little here: a call is a batch, which grows with the load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Literal

from fettle.config import AutoscaleConfig
from fettle.errors import UsageError

# Rates are means over LONG_S, so that chance in the arrivals moves them little, and over SHORT_S where those few
# seconds show beyond doubt that more comes.
LONG_S = 15.0
SHORT_S = 3.0
# Standard deviations below the mean of a short count that are still believed.
DOUBT = 2.0
# Rows of one request come together, and differ in cost: their counts scatter by this much more than independent ones.
SCATTER = 2.0
# Beside the utilisation: so many times the root of the replicas that are busy on average.
ROOM = 0.1
# This part of a replica is not worth one, and this much more than was needed at the height stays when some go: without
# both a steady load whose chance fluctuations touch a whole number would add and remove the same replica for ever.
SLACK = 0.1
SPARE = 0.05
# At most this share goes at once, and the next no earlier than this part of the delay later.
DOWN_SHARE = 0.25
DOWN_STEPS = 6.0
# What has just been given up must be worth its start: nothing goes within so many times of what a start takes.
STARTS = 2.0
WEIGHT = 0.3

Cause = Literal["arrivals", "burst", "backlog", "awake", "calm", "idle", "bounds", "memory", "steady"]


@dataclass(frozen=True, slots=True)
class Load:
    """One deployment as it was observed.

    `running` replicas of `wanted`; the rest starts. `rate` and `recent`: work that came, in replica-seconds a second,
    over LONG_S and over SHORT_S, the second as far as it is certain (`certain`). `backlog_s`: work that waits, in
    replica-seconds. `waiting`: something is there that no replica has begun.
    """

    running: int
    wanted: int
    least: int
    most: int
    rate: float = 0.0
    recent: float = 0.0
    backlog_s: float = 0.0
    waiting: bool = False

    @property
    def used(self) -> bool:
        return self.waiting or self.rate > 0 or self.backlog_s > 0


@dataclass(frozen=True, slots=True)
class Past:
    """What is remembered of one deployment. Times are of the caller's clock.

    `needs`: (time, replicas needed) since the window began, each higher than all after it: the first is the height.
    """

    needs: tuple[tuple[float, float], ...] = ()
    since: float = 0.0
    used: float = 0.0
    lowered: float = -math.inf
    asked: float | None = None
    start_s: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """`replicas` for a deployment that has `before`, and why."""

    deployment: str
    before: int
    replicas: int
    cause: Cause
    reason: str

    def __str__(self) -> str:
        return f"{self.deployment}: {self.before} -> {self.replicas} replicas: {self.reason}"


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory for all replicas together, and what one of each takes; those that are not named are not counted."""

    bytes: int
    each: Mapping[str, int]

    def most(self, wanted: Mapping[str, int], loads: Mapping[str, Load]) -> dict[str, int]:
        """As many of what is wanted as fit: what runs or is always kept first, then who lacks the largest part."""
        given = {name: min(count, max(loads[name].least, loads[name].wanted)) for name, count in wanted.items()}
        left = self.bytes - sum(self.each.get(name, 0) * count for name, count in given.items())
        short = {name for name, count in wanted.items() if given[name] < count}
        while short:
            name = max(short, key=lambda each: (1 - given[each] / wanted[each], each))
            if self.each.get(name, 0) > left:
                short.discard(name)
                continue
            left -= self.each.get(name, 0)
            given[name] += 1
            if given[name] == wanted[name]:
                short.discard(name)
        return given


def sized(
    loads: Mapping[str, Load],
    past: Mapping[str, Past],
    now: float,
    configs: Mapping[str, AutoscaleConfig],
    budget: Budget | None = None,
) -> tuple[dict[str, Decision], dict[str, Past]]:
    """How many of each there should be from now on, and what to remember until the next time."""
    decisions, after = {}, {}
    for name, load in loads.items():
        config = configs[name]
        after[name] = seen = remembered(past.get(name) or Past(since=now, used=now), load, now, config)
        decisions[name] = decided(name, load, seen, now, config)
    if budget is not None:
        fitting = budget.most({name: made.replicas for name, made in decisions.items()}, loads)
        for name, count in fitting.items():
            made = decisions[name]
            if count < made.replicas:
                reason = f"{made.reason}; there is memory for {count} of {made.replicas}"
                decisions[name] = replace(made, replicas=count, cause="memory", reason=reason)
    for name, made in decisions.items():
        if made.replicas < made.before:
            after[name] = replace(after[name], lowered=now)
    return decisions, after


def needed(load: Load, config: AutoscaleConfig) -> float:
    """Replicas, in parts of one: for what comes, at the target utilisation, and to drain what is there in time.

    Few replicas get more room than many: what comes by chance in a moment scatters by the root of what comes
    (square-root staffing: Halfin and Whitt, "Heavy-traffic limits for queues with many exponential servers", 1981).
    """
    comes = max(load.rate, load.recent)
    return comes / config.target_utilisation + ROOM * math.sqrt(comes) + load.backlog_s / config.drain_s


def remembered(past: Past, load: Load, now: float, config: AutoscaleConfig) -> Past:
    """The past with one more observation in it."""
    need = needed(load, config)
    begin = now - delay_s(past, config)
    kept = tuple((at, value) for at, value in past.needs if at >= begin and value > need)
    asked, start_s = past.asked, past.start_s
    if load.running < load.wanted:
        asked = now if asked is None else asked
    elif asked is not None:
        took = now - asked
        start_s = took if start_s is None else start_s + WEIGHT * (took - start_s)
        asked = None
    used = now if load.used else past.used
    return replace(past, needs=(*kept, (now, need)), used=used, asked=asked, start_s=start_s)


def delay_s(past: Past, config: AutoscaleConfig) -> float:
    """How long less must have been enough before replicas go."""
    return max(config.down_delay_s, STARTS * (past.start_s or 0.0))


def decided(name: str, load: Load, past: Past, now: float, config: AutoscaleConfig) -> Decision:
    """One deployment by itself; `past` has this observation in it."""
    need = needed(load, config)
    height = past.needs[0][1]
    enough = math.ceil(need - SLACK)
    if load.used:
        enough = max(1, enough)
    if enough > load.wanted:
        cause, reason = _why_more(load, need, config)
        count = enough
    else:
        count, cause, reason = _fewer(load, past, now, config, height)
    bounded = min(max(count, load.least), load.most)
    if bounded != count:
        side = "most" if bounded < count else "least"
        reason = f"{reason}; {bounded} is the {side} that is allowed"
        cause = "bounds" if bounded == load.wanted or cause == "steady" else cause
    return Decision(name, load.wanted, bounded, cause, reason)


def _why_more(load: Load, need: float, config: AutoscaleConfig) -> tuple[Cause, str]:
    if load.wanted == 0:
        return "awake", "it is asked for again"
    drain = load.backlog_s / config.drain_s
    share = f"at {100 * config.target_utilisation:g} %"
    if drain > need / 2:
        return "backlog", f"{load.backlog_s:.1f} s of work wait, to be done in {config.drain_s:g} s"
    if load.recent > load.rate:
        return "burst", f"work for {need:.1f} came in the last {SHORT_S:g} s, {share}"
    return "arrivals", f"work comes for {need:.1f}, {share}"


def _fewer(load: Load, past: Past, now: float, config: AutoscaleConfig, height: float) -> tuple[int, Cause, str]:
    """What may go, if anything may."""
    wait_s = delay_s(past, config)
    if load.wanted == 1 and load.least == 0 and _idle(past, now, config) and not load.used:
        return 0, "idle", f"nobody asked for {now - past.used:.0f} s"
    floor = max(1, math.ceil(height * (1 + SPARE) + SLACK)) if load.wanted else 0
    # Until a whole window was seen nothing is known of its height; those that start were asked for just now.
    settled = now - past.since >= wait_s and now - past.lowered >= wait_s / DOWN_STEPS
    if floor >= load.wanted or not settled:
        return load.wanted, "steady", f"{height:.1f} needed at the height of {wait_s:.0f} s"
    count = max(floor, load.wanted - max(1, int(DOWN_SHARE * load.wanted)))
    return count, "calm", f"{height:.1f} were needed at the height of the last {wait_s:.0f} s"


def _idle(past: Past, now: float, config: AutoscaleConfig) -> bool:
    return now - past.used >= max(config.zero_delay_s, delay_s(past, config))


# ---- From counters to rates


@dataclass(frozen=True, slots=True)
class Count:
    """A router's counters at one time: `work_s` that came so far, in `rows`."""

    at: float
    work_s: float
    rows: float


def arrivals(routers: Sequence[Sequence[Count]], seconds: float) -> tuple[float, float]:
    """Work a second over the last `seconds`, of all routers together, and in how many rows it came.

    Each router's counters, oldest first; those of one that has just begun say nothing yet.
    """
    spans = [span for counts in routers if (span := _span(counts, seconds)) is not None]
    return sum(span.work_s / span.at for span in spans), sum(span.rows for span in spans)


def certain(work: float, rows: float) -> float:
    """The part of such a rate that chance does not explain: less by `DOUBT` standard deviations of the count."""
    return work * max(0.0, 1 - DOUBT * math.sqrt(SCATTER / rows)) if rows > 0 else 0.0


def _span(counts: Sequence[Count], seconds: float) -> Count | None:
    """What came in the last `seconds`, in how many of them (`at`)."""
    if len(counts) < 2:
        return None
    last = counts[-1]
    first = next(dropwhile(lambda count: count.at < last.at - seconds - 1e-9, counts))
    first = counts[-2] if first is last else first
    took = last.at - first.at
    return Count(took, last.work_s - first.work_s, last.rows - first.rows) if took > 0 else None


# ---- Shares of a GPU


def gpu_share(name: str, needs_bytes: int, card_bytes: int) -> float:
    """The part of a card that a replica asks Ray for, in hundredths, so that whatever shares the card fits its memory.

    Ray adds up the shares that replicas ask for and looks at nothing else: with shares of memory the sum is right.

    Raises:
        UsageError: one replica needs more than a card.
    """
    share = math.ceil(100 * needs_bytes / card_bytes) / 100
    if share > 1:
        raise UsageError(
            f"variant {name!r} needs {needs_bytes / 1e9:.1f} GB of a GPU's memory, a card has "
            f"{card_bytes / 1e9:.1f} GB; leave it out (variants), or name GPUs with more (replicas.gpu_memory_bytes)"
        )
    return share


def check_gpu_share(name: str, share: float, needs_bytes: int, card_bytes: int) -> None:
    """For a share that the user gave.

    Raises:
        UsageError: so many replicas would share a card that their memory does not fit.
    """
    together = int(1 / share + 1e-9) if share < 1 else 1
    if together * needs_bytes > max(1.0, share) * card_bytes:
        raise UsageError(
            f"replicas.gpus {share:g} lets {together} replicas share a card, but variant {name!r} needs "
            f"{needs_bytes / 1e9:.1f} GB each and a card has {card_bytes / 1e9:.1f} GB; give at least "
            f"{min(1.0, math.ceil(100 * needs_bytes / card_bytes) / 100):g}, or leave gpus out"
        )
