"""The autoscaling policy: enough, up at once, down slowly, no oscillation, to nothing and back, within memory."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from fettle.autoscale import (
    LONG_S,
    SHORT_S,
    Budget,
    Count,
    Decision,
    Load,
    Past,
    arrivals,
    certain,
    check_gpu_share,
    gpu_share,
    needed,
    sized,
)
from fettle.config import AutoscaleConfig
from fettle.errors import UsageError

CONFIG = AutoscaleConfig(target_utilisation=0.8, drain_s=5, down_delay_s=30, zero_delay_s=60)
NAME = "family.variant"


def load(
    rate: float = 0.0, *, wanted: int = 1, running: int | None = None, least: int = 1, most: int = 100, **more
) -> Load:
    return Load(wanted if running is None else running, wanted, least, most, rate=rate, **more)


class Clock:
    """One deployment, decided about every second."""

    def __init__(self, wanted: int = 1, *, start_s: int = 0, config: AutoscaleConfig = CONFIG, **bounds: int) -> None:
        self.wanted, self.now = wanted, 0.0
        self.decisions: list[Decision] = []
        self._config, self._bounds, self._start_s = config, bounds, start_s
        self._running = [wanted] * max(1, start_s)
        self._past: dict[str, Past] = {}

    def tick(self, rate: float = 0.0, **more: float) -> Decision:
        self._running = [*self._running[1:], self.wanted] if self._start_s else [self.wanted]
        seen = load(rate, wanted=self.wanted, running=min(self._running[0], self.wanted), **self._bounds, **more)
        made, self._past = sized({NAME: seen}, self._past, self.now, {NAME: self._config})
        self.now += 1
        self.wanted = made[NAME].replicas
        if made[NAME].replicas != made[NAME].before:
            self.decisions.append(made[NAME])
        return made[NAME]

    def run(self, seconds: int, rate: float = 0.0, **more: float) -> None:
        for _ in range(seconds):
            self.tick(rate, **more)


def test_there_are_enough_for_what_comes_at_the_target_and_more_to_drain_what_waits():
    busy = needed(load(8.0), CONFIG)
    assert 8.0 / 0.8 < busy < 8.0 / 0.8 + 1
    assert needed(load(8.0, backlog_s=10.0), CONFIG) == pytest.approx(busy + 2.0)


def test_few_replicas_get_more_room_than_many():
    assert needed(load(1.0), CONFIG) / 1.0 > needed(load(100.0), CONFIG) / 100.0


def test_more_come_at_once_and_say_why():
    clock = Clock(2)
    made = clock.tick(8.0)
    assert (made.before, made.replicas, made.cause) == (2, 11, "arrivals")
    assert "10.3" in made.reason
    assert str(made).startswith(f"{NAME}: 2 -> 11 replicas")


def test_a_backlog_alone_is_a_reason():
    made = Clock(1).tick(0.1, backlog_s=20.0)
    assert (made.replicas, made.cause) == (5, "backlog")


def test_fewer_only_once_less_was_enough_for_the_whole_delay():
    clock = Clock(1)
    clock.run(40, 8.0)
    assert clock.wanted == 11
    before = clock.now
    while clock.wanted == 11 and clock.now < before + 100:
        clock.tick(2.0)
    assert clock.now - before == pytest.approx(CONFIG.down_delay_s, abs=2)
    assert clock.decisions[-1].cause == "calm"
    assert clock.wanted == 9, "a quarter at most at a time"
    clock.run(100, 2.0)
    assert clock.wanted == 3


def test_one_high_second_keeps_what_is_there():
    clock = Clock(1)
    clock.run(40, 8.0)
    for _ in range(20):
        clock.run(25, 2.0)
        clock.tick(8.0)
    assert clock.wanted == 11


def test_nothing_goes_within_two_starts_of_what_a_start_takes():
    slow = Clock(1, start_s=60)
    slow.run(200, 8.0)
    assert slow.wanted == 11
    slow.run(100, 2.0)
    assert slow.wanted == 11, "a start took 60 s, so less must be enough for twice that"
    slow.run(100, 2.0)
    assert slow.wanted < 11


@pytest.mark.parametrize("level", [0.8, 3.0, 3.2, 8.0, 40.0])
def test_a_steady_noisy_load_settles(level):
    """The scatter that a mean over LONG_S of rows that come by chance has."""
    source = random.Random(level)
    clock = Clock(max(1, math.ceil(level)))
    history: list[float] = []
    for _ in range(900):
        # Fifty rows a second for each replica that is busy.
        history.append(source.gauss(level, math.sqrt(level * 50) / 50))
        recent = history[-int(LONG_S) :]
        clock.tick(max(0.0, sum(recent) / len(recent)))
    late = clock.decisions[4:]
    turns = sum((one.replicas > one.before) != (two.replicas > two.before) for one, two in itertools.pairwise(late))
    assert turns <= 2, [str(one) for one in clock.decisions]


def test_to_nothing_where_nobody_asks_and_back_at_once():
    clock = Clock(3, least=0)
    clock.run(70)
    assert clock.wanted == 0
    # Serve gives up the last one only where there is one.
    assert [one.replicas for one in clock.decisions[-2:]] == [1, 0]
    assert clock.decisions[-1].cause == "idle"
    clock.run(100)
    assert clock.wanted == 0
    made = clock.tick(waiting=True)
    assert (made.replicas, made.cause) == (1, "awake")


def test_what_began_at_nothing_stays_there():
    clock = Clock(0, least=0)
    clock.run(100)
    assert clock.decisions == []


def test_one_that_is_asked_now_and_then_stays():
    clock = Clock(1, least=0)
    for _ in range(10):
        clock.run(40)
        clock.tick(waiting=True)
    assert clock.wanted == 1


def test_bounds_hold_and_are_said():
    most = Clock(1, most=4)
    made = most.tick(8.0)
    assert made.replicas == 4
    assert "4 is the most" in made.reason
    assert Clock(1, least=3).tick(0.0).replicas == 3


def test_memory_is_given_to_who_lacks_most():
    loads = {"a": load(9.0, wanted=1), "b": load(2.0, wanted=1), "c": load(0.0, wanted=2)}
    configs = dict.fromkeys(loads, CONFIG)
    made, _ = sized(loads, {}, 0.0, configs, Budget(10, {"a": 1, "b": 2, "c": 1}))
    counts = {name: one.replicas for name, one in made.items()}
    assert counts["c"] == 2, "what runs stays"
    assert counts["a"] + 2 * counts["b"] + counts["c"] <= 10
    assert counts["a"] > 1
    assert counts["b"] > 1
    assert made["a"].cause == "memory"
    assert "there is memory for" in made["a"].reason


def test_what_a_budget_cannot_hold_at_all_still_runs_as_it_is():
    made, _ = sized({"a": load(9.0, wanted=2)}, {}, 0.0, {"a": CONFIG}, Budget(1, {"a": 5}))
    assert made["a"].replicas == 2


def test_rates_are_of_counters_over_their_last_seconds_and_of_all_routers():
    one = [Count(float(at), 0.5 * at, 10.0 * at) for at in range(30)]
    two = [Count(float(at), 0.0, 0.0) for at in range(27)] + [Count(27.0 + at, 6.0 * at, 9.0 * at) for at in range(3)]
    assert arrivals([one], LONG_S) == (pytest.approx(0.5), pytest.approx(150))
    work, rows = arrivals([one, two], SHORT_S)
    assert work == pytest.approx(0.5 + 12 / 3)
    assert rows == pytest.approx(30 + 18)


@pytest.mark.parametrize("counts", [[], [[]], [[Count(1.0, 5.0, 5.0)]]])
def test_a_router_that_has_just_begun_says_nothing_yet(counts):
    assert arrivals(counts, LONG_S) == (0, 0)


def test_a_few_rows_are_no_certain_burst():
    assert certain(10.0, 4) == 0.0
    assert 8.0 < certain(10.0, 1000) < 10.0


def test_a_share_of_a_card_is_its_part_of_the_memory_rounded_up():
    assert gpu_share("v", 10_000, 40_000) == 0.25
    assert gpu_share("v", 10_001, 40_000) == 0.26
    # As many as Ray puts on one card fit it.
    for need in range(1, 100):
        together = math.floor(1 / gpu_share("v", need, 100) + 1e-9)
        assert together * need <= 100


def test_what_no_card_holds_is_refused():
    with pytest.raises(UsageError, match=r"'big' needs 50\.0 GB .* a card has 40\.0 GB"):
        gpu_share("big", 50 * 10**9, 40 * 10**9)


@pytest.mark.parametrize(("share", "fits"), [(0.5, True), (0.3, False), (0.25, False), (1.0, True), (2.0, True)])
def test_a_given_share_is_checked_against_the_memory(share, fits):
    if fits:
        check_gpu_share("v", share, 20, 50)
        return
    with pytest.raises(UsageError, match=r"replicas\.gpus .* give at least 0\.4"):
        check_gpu_share("v", share, 20, 50)
