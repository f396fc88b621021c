"""Whose turn it is: what holds for every queue, whatever comes and goes, and a few figures by hand."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.scheduling import (
    NEVER,
    PROMISED,
    SLACK,
    BatchBounds,
    Entry,
    Priority,
    Queue,
    Speed,
    Taken,
    corrected_pace,
    retry_after_s,
)

WAIT_S = 2.0
MAX_AGE_S = 0.1
AT_ONCE = Speed()
# Nothing but the order by `due` decides who goes.
IN_ORDER = BatchBounds(rows=64, tokens=10**9, max_age_s=NEVER, gap_tokens=10**9)

bounds_of_batches = st.builds(
    BatchBounds,
    rows=st.integers(1, 12),
    tokens=st.integers(1, 600),
    max_age_s=st.sampled_from([0.0, MAX_AGE_S, NEVER]),
    gap_tokens=st.integers(1, 200),
)
speeds = st.builds(
    Speed, pace=st.sampled_from([0.5, 1.0, 3.0]), replicas=st.sampled_from([0.5, 1.0, 4.0]), call_s=st.floats(0, 0.02)
)
weights = {"a": 1.0, "b": 1.0, "c": 3.0}


@dataclass(frozen=True)
class Wanted:
    """An entry to come: `within_s` of its arrival for a deadline."""

    length: int
    cost_ms: float
    within_s: float = NEVER
    key: str = ""
    priority: Priority = Priority.INTERACTIVE

    def entry(self, now: float) -> Entry:
        deadline = now + self.within_s
        return Entry(
            length=self.length,
            cost_ms=self.cost_ms,
            arrived=now,
            due=min(deadline, now + WAIT_S),
            deadline=deadline,
            key=self.key,
            weight=weights.get(self.key, 1.0),
            priority=self.priority,
        )


def wanted(
    *, within: st.SearchStrategy[float] = st.just(NEVER), keys: Sequence[str] = ("",), mixed: bool = False
) -> st.SearchStrategy[Wanted]:
    return st.builds(
        Wanted,
        length=st.integers(1, 128),
        cost_ms=st.floats(0.1, 30),
        within_s=within,
        key=st.sampled_from(keys),
        priority=st.sampled_from(Priority) if mixed else st.just(Priority.INTERACTIVE),
    )


some_deadlines = st.one_of(st.just(NEVER), st.floats(0.0, 0.5))
everything = wanted(within=some_deadlines, keys=["a", "b", "c"], mixed=True)


def filled(wants: Iterable[Wanted], bounds: BatchBounds = IN_ORDER, now: float = 0.0) -> tuple[Queue, list[Entry]]:
    queue = Queue(bounds)
    entries = [want.entry(now) for want in wants]
    for entry in entries:
        queue.push(entry)
    return queue, entries


def row(cost_ms: float = 10.0, within_s: float = NEVER, key: str = "", length: int = 10, **more: object) -> Wanted:
    return Wanted(length, cost_ms, within_s, key, **more)  # type: ignore[arg-type]


def padded_tokens(batch: Sequence[Entry]) -> int:
    return max(entry.length for entry in batch) * len(batch)


def assert_nothing_is_left(queue: Queue) -> None:
    assert len(queue) == 0
    assert [queue.work_ms(priority) for priority in Priority] == pytest.approx([0, 0, 0], abs=1e-6)
    assert queue._under_way_ms == pytest.approx(0, abs=1e-6)
    assert not queue._admitted
    assert not any(queue._outstanding.values())


@dataclass
class Life:
    """A queue among arrivals, departures, losses and batches that come back, step by step as a list of choices says."""

    queue: Queue
    speed: Speed
    now: float = 0.0
    under_way: list[list[Entry]] = field(default_factory=list)
    pushed: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def arrive(self, want: Wanted) -> None:
        entry = want.entry(self.now)
        self.pushed.append(entry)
        self.queue.push(entry)

    def take(self, lowest: Priority = Priority.SHADOW) -> Taken:
        taken = self.queue.take(self.now, self.speed, lowest)
        self.left += taken.late
        if taken.batch:
            self.under_way.append(taken.batch)
        return taken

    def take_one(self, number: int) -> None:
        waiting = list(self.queue)
        if waiting:
            entry = waiting[number % len(waiting)]
            self.queue.take_one(entry)
            self.under_way.append([entry])

    def finish(self, number: int) -> None:
        if self.under_way:
            for entry in self.under_way.pop(number % len(self.under_way)):
                self._settle(entry)

    def lose(self, number: int) -> None:
        """A replica dies with a batch: its rows come back."""
        if self.under_way:
            for entry in self.under_way.pop(number % len(self.under_way)):
                self.queue.push(entry)

    def leave(self, number: int) -> None:
        """A client goes while its row waits."""
        waiting = list(self.queue)
        if waiting:
            self._settle(waiting[number % len(waiting)])

    def drain(self) -> None:
        while True:
            while self.under_way:
                self.finish(0)
            self.now += 1.0
            if not self.take().batch and not len(self.queue):
                return

    def _settle(self, entry: Entry) -> None:
        self.queue.settle(entry)
        self.left.append(entry)
        # The batcher may do it again, when the client's own task ends.
        self.queue.settle(entry)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), everything),
        st.tuples(st.just("take"), st.sampled_from(Priority)),
        st.tuples(st.sampled_from(["take_one", "finish", "lose", "leave"]), st.integers(0, 20)),
        st.tuples(st.just("wait"), st.floats(0, 0.2)),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(steps, bounds_of_batches, speeds)
def test_every_entry_leaves_exactly_once_and_the_accounts_end_at_nothing(plan, bounds, speed):
    life = Life(Queue(bounds), speed)
    for what, argument in plan:
        if what == "wait":
            life.now += argument
        else:
            getattr(life, what)(argument)
        held = [entry for batch in life.under_way for entry in batch]
        waiting = list(life.queue)
        assert sorted(map(id, [*held, *waiting, *life.left])) == sorted(map(id, life.pushed))
        for priority in Priority:
            mine = [entry.cost_ms for entry in [*held, *waiting] if entry.priority is priority]
            assert life.queue.work_ms(priority) == pytest.approx(sum(mine), abs=1e-6)
        assert life.queue._under_way_ms == pytest.approx(sum(entry.cost_ms for entry in held), abs=1e-6)
        assert all(entry.waiting for entry in waiting)
        assert not any(entry.waiting for entry in [*held, *life.left])
    life.drain()
    assert sorted(map(id, life.left)) == sorted(map(id, life.pushed))
    assert_nothing_is_left(life.queue)


@settings(max_examples=200)
@given(st.lists(everything, min_size=1, max_size=40), bounds_of_batches, speeds, st.floats(0, 1))
def test_a_batch_keeps_its_bounds_unless_it_is_one_long_row(wants, bounds, speed, passed):
    queue, _ = filled(wants, bounds)
    while batch := queue.take(passed, speed).batch:
        [priority] = {entry.priority for entry in batch}
        assert len(batch) <= bounds.rows
        tokens = bounds.tokens if priority is Priority.INTERACTIVE else bounds.gap_tokens
        assert len(batch) == 1 or padded_tokens(batch) <= tokens
        assert len(set(map(id, batch))) == len(batch)


@settings(max_examples=200)
@given(st.lists(everything, min_size=1, max_size=40), bounds_of_batches, speeds, st.floats(0, 0.3))
def test_no_batch_makes_a_member_late(wants, bounds, speed, passed):
    queue, _ = filled(wants, bounds)
    under_way = 0.0
    while batch := queue.take(passed, speed).batch:
        takes = sum(entry.cost_ms for entry in batch)
        ends = passed + speed.seconds(under_way) + takes / 1000 * speed.pace + speed.call_s
        assert ends <= min(entry.deadline for entry in batch) + 1e-9
        under_way += takes


@given(st.lists(wanted(within=some_deadlines), max_size=30), speeds, st.floats(0, 0.5))
def test_late_are_those_that_even_alone_would_be(wants, speed, now):
    queue, entries = filled(wants)
    taken = queue.take(now, speed)
    alone = [now + entry.cost_ms / 1000 * speed.pace + speed.call_s for entry in entries]
    late = [entry for entry, ends in zip(entries, alone, strict=True) if entry.deadline < ends]
    assert set(map(id, taken.late)) == set(map(id, late))
    assert queue.work_ms() == pytest.approx(sum(entry.cost_ms for entry in entries if entry not in late), abs=1e-6)


@settings(max_examples=150)
@given(st.lists(st.one_of(everything, st.none()), max_size=60), bounds_of_batches, st.sampled_from(Priority))
def test_lower_priorities_go_only_where_nothing_above_them_waits(events, bounds, lowest):
    queue = Queue(bounds)
    now = 0.0
    for want in [*events, *[None] * 60]:
        now += 0.01
        if want is not None:
            queue.push(want.entry(now))
            continue
        batch = queue.take(now, AT_ONCE, lowest).batch
        for entry in batch:
            assert entry.priority <= lowest
            assert not any(queue.waiting(above) for above in Priority if above < entry.priority)
            queue.settle(entry)
    assert all(entry.priority > lowest for entry in queue)


@given(st.lists(wanted(within=st.one_of(st.just(NEVER), st.floats(1, 5))), max_size=30))
def test_one_at_a_time_the_earliest_due_goes_first(wants):
    queue, entries = filled(wants, BatchBounds(rows=1, tokens=1, max_age_s=NEVER))
    taken = []
    while batch := queue.take(0.0, AT_ONCE).batch:
        taken += batch
        queue.settle(batch[0])
    assert [entry.due for entry in taken] == sorted(entry.due for entry in entries)


@given(st.lists(wanted(within=some_deadlines), min_size=1, max_size=30), bounds_of_batches, st.floats(0, 0.3))
def test_the_most_urgent_row_is_in_every_batch(wants, bounds, now):
    queue, entries = filled(wants, bounds)
    taken = queue.take(now, AT_ONCE)
    left = [entry for entry in entries if entry not in taken.late]
    if left:
        assert taken.batch[0].due == min(entry.due for entry in left)


@settings(max_examples=150)
@given(
    st.lists(st.lists(wanted(within=some_deadlines), max_size=15), min_size=1, max_size=15),
    bounds_of_batches,
    st.sampled_from([0.0, 0.03, 0.2]),
)
def test_a_row_waits_for_no_more_batches_than_there_are_rows_due_before_it(arrivals, bounds, tick):
    """Rows with deadlines come all the time, and others that fit better: those without a deadline do not starve."""
    queue = Queue(bounds)
    now = 0.0
    passed: dict[int, int] = {}
    everyone: list[Entry] = []
    coming = list(arrivals)
    while coming or len(queue):
        for want in coming.pop(0) if coming else []:
            entry = want.entry(now)
            everyone.append(entry)
            passed[id(entry)] = 0
            queue.push(entry)
        now += tick
        for entry in queue.take(now, AT_ONCE).batch:
            queue.settle(entry)
        for entry in queue:
            passed[id(entry)] += 1
            before = sum(other.due <= entry.due for other in everyone if other is not entry)
            assert passed[id(entry)] <= before


@given(st.lists(wanted(), min_size=2, max_size=40), st.integers(2, 12))
def test_fresh_rows_are_those_nearest_to_the_leader(wants, rows):
    queue, entries = filled(wants, BatchBounds(rows=rows, tokens=10**9, max_age_s=MAX_AGE_S))
    batch = queue.take(0.0, AT_ONCE).batch
    assert batch[0] is entries[0]
    farthest = max(abs(entry.length - entries[0].length) for entry in batch)
    assert all(abs(entry.length - entries[0].length) >= farthest for entry in queue)


@given(st.lists(wanted(), min_size=2, max_size=40), bounds_of_batches)
def test_overdue_rows_are_not_passed_over_for_a_better_fit(wants, bounds):
    queue, _ = filled(wants, BatchBounds(bounds.rows, bounds.tokens, MAX_AGE_S))
    batch = queue.take(MAX_AGE_S + 0.01, AT_ONCE).batch
    # All are overdue, so a row that is passed over did not fit beside those before it.
    if len(batch) < bounds.rows:
        for entry in queue:
            before = [other for other in batch if other.due <= entry.due]
            assert padded_tokens([*before, entry]) > bounds.tokens


@given(st.lists(wanted(), min_size=1, max_size=40), bounds_of_batches)
def test_a_batch_is_as_full_as_its_bounds_allow(wants, bounds):
    queue, _ = filled(wants, bounds)
    batch = queue.take(0.0, AT_ONCE).batch
    if len(batch) < bounds.rows:
        assert all(padded_tokens([*batch, entry]) > bounds.tokens for entry in queue)


def test_a_batch_of_a_lower_priority_is_small_so_that_it_soon_makes_room():
    queue, _ = filled([row(priority=Priority.BATCH)] * 10, BatchBounds(64, 1000, MAX_AGE_S, gap_tokens=40))
    assert len(queue.take(0.0, AT_ONCE).batch) == 4


# Fairness between keys.

KEYED = BatchBounds(rows=8, tokens=80, max_age_s=MAX_AGE_S)


def turns_until(queue: Queue, entry: Entry, now: float = 10.0) -> int:
    """Batches until this one goes, the batch it is in included."""
    for turn in range(1, 10_000):
        batch = queue.take(now, AT_ONCE).batch
        for each in batch:
            queue.settle(each)
        if entry in batch:
            return turn
    raise AssertionError("it starved")


@settings(max_examples=100)
@given(
    st.lists(wanted(keys=["a"]), min_size=20, max_size=120),
    st.integers(0, 10),
    st.floats(0.1, 30),
    st.integers(1, 80),
)
def test_a_flood_delays_another_key_by_one_batch_at_most(flood, before, cost_ms, length):
    queue, _ = filled(flood, KEYED)
    for _ in range(before):
        for entry in queue.take(5.0, AT_ONCE).batch:
            queue.settle(entry)
    other = Wanted(length, cost_ms, key="b").entry(9.0)
    queue.push(other)
    assert turns_until(queue, other) <= 2


def shares(queue: Queue, batches: int, now: float = 10.0) -> dict[str, float]:
    """Work given to each key."""
    given: dict[str, float] = {}
    for _ in range(batches):
        for entry in queue.take(now, AT_ONCE).batch:
            given[entry.key] = given.get(entry.key, 0.0) + entry.cost_ms
            queue.settle(entry)
    return given


@settings(max_examples=40)
@given(st.integers(0, 2**20), st.integers(1, 25))
def test_backlogged_keys_share_by_weight(seed, batches):
    """Whatever they send and in whatever order: to within about a batch."""
    chance = random.Random(seed)
    wants = [
        Wanted(chance.randint(5, 10), chance.uniform(1, 3), key=chance.choices("abc", [8, 1, 3])[0])
        for _ in range(2500)
    ]
    queue, entries = filled(wants, KEYED)
    budget = sum(entry.cost_ms for entry in entries) / sum(entry.length for entry in entries) * KEYED.tokens
    given = shares(queue, batches)
    relative = [given.get(key, 0.0) / weights[key] for key in "abc"]
    assert {entry.key for entry in queue} == {"a", "b", "c"}
    assert max(relative) - min(relative) <= (1 + SLACK) * budget + 3


def turns(queue: Queue, count: int, begin: float) -> list[dict[str, float]]:
    """Work given to each key in each of so many batches, one after the other, each as long as its work says."""
    given, now = [], begin
    for _ in range(count):
        given.append(shares(queue, 1, now))
        now += sum(given[-1].values()) / 1000
    return given


def total(given: list[dict[str, float]], key: str) -> float:
    return sum(turn.get(key, 0.0) for turn in given)


def test_a_key_that_comes_new_goes_first_for_a_while_and_then_shares():
    queue, _ = filled([row(key="a")] * 800, KEYED)
    assert total(turns(queue, 40, 0.0), "b") == 0.0
    for _ in range(800):
        queue.push(row(key="b").entry(3.2))
    first, then = turns(queue, 5, 3.2), turns(queue, 40, 4.4)
    assert total(first, "a") == 0.0
    assert total(then, "a") == pytest.approx(total(then, "b"), rel=0.25)


def test_who_takes_less_than_its_share_has_its_burst_first():
    queue, _ = filled([row(key="a")] * 800, KEYED)
    turns(queue, 20, 0.0)
    burst = [row(key="b").entry(1.6) for _ in range(16)]
    for entry in burst:
        queue.push(entry)
    assert total(turns(queue, 2, 1.6), "b") == sum(entry.cost_ms for entry in burst)


def test_keys_that_are_gone_leave_no_trace():
    queue = Queue(KEYED)
    for number in range(500):
        entry = row(key=f"key-{number}").entry(number)
        queue.push(entry)
        queue.settle(queue.take(number, AT_ONCE).batch[0])
    assert len(queue._served) <= 10
    assert len(queue._weights) <= 1
    assert_nothing_is_left(queue)


# Admission.


def test_a_request_may_enter_while_the_work_before_it_is_below_the_limit():
    queue, entries = filled([row(99.0)])
    assert queue.has_room("", 1.0, 100.0)
    queue.push(row(1.0).entry(0.0))
    assert not queue.has_room("", 1.0, 100.0)
    # However much of it runs already: what runs has to be waited for as well.
    queue.take_one(entries[0])
    assert not queue.has_room("", 1.0, 100.0)
    queue.settle(entries[0])
    assert queue.has_room("", 1.0, 100.0)


def test_a_key_that_floods_is_refused_and_the_others_are_not():
    queue, _ = filled([row(key="a", cost_ms=50)] * 20)
    assert not queue.has_room("a", 1.0, 1000.0)
    assert queue.has_room("b", 1.0, 1000.0)
    # Up to its own part of the limit: half of it beside one other key, three quarters at three times the weight.
    for key, share in (("b", 500), ("c", 600)):
        queue, _ = filled([*[row(key="a", cost_ms=50)] * 20, row(key="b", cost_ms=share - 1)])
        weight = weights[key]
        if key == "c":
            queue.push(row(key="c", cost_ms=599).entry(0.0))
            # Beside two others of weight 1 its part is 3 of 5.
        assert queue.has_room(key, weight, 1000.0)
        queue.push(row(key=key, cost_ms=1.5).entry(0.0))
        assert not queue.has_room(key, weight, 1000.0)


@given(st.lists(wanted(keys=["a", "b", "c"]), max_size=60), st.floats(1, 500))
def test_admission_by_share_bounds_each_key_and_the_whole(wants, limit_ms):
    """The greediest clients: whoever may enter does. One request may overshoot, its work counts for those after it."""
    queue = Queue(IN_ORDER)
    most = max((want.cost_ms for want in wants), default=0.0)
    for want in wants:
        entry = want.entry(0.0)
        free = queue.work_ms() < limit_ms
        allowed = queue.has_room(entry.key, entry.weight, limit_ms)
        assert allowed or not free
        if allowed:
            queue.push(entry)
    # Each of the three keys may fill its part where the whole is full already, and the first alone may fill it all.
    assert queue.work_ms() <= limit_ms * 2 + 3 * most


def test_each_priority_has_a_limit_of_its_own():
    queue, _ = filled([row(1000.0, priority=Priority.BATCH)])
    assert queue.has_room("", 1.0, 100.0)
    assert not queue.has_room("", 1.0, 100.0, Priority.BATCH)
    assert queue.work_ms() == 0.0


# Promises.


def test_what_does_not_fit_before_its_deadline_is_not_promised():
    queue, _ = filled([row(100.0 / PROMISED, within_s=0.5)])

    def promises(cost_ms: float, within_s: float, speed: Speed = AT_ONCE) -> bool:
        return queue.can_promise([row(cost_ms / PROMISED, within_s).entry(0.0)], 0.0, speed)

    assert promises(50.0, 0.06), "it goes before the one that waits, which has time"
    assert not promises(50.0, 0.04)
    assert not promises(450.0, 0.45), "it would make the other late"
    assert promises(450.0, 0.6), "it goes after the other"
    assert not promises(450.0, 0.54)
    assert not promises(450.0, 0.54, Speed(replicas=2.0)), "its batch runs at one of the two"
    assert not promises(450.0, 0.6, Speed(pace=2.0))
    assert not promises(450.0, 0.6, Speed(call_s=0.1))


def test_without_a_deadline_nothing_is_promised_and_nothing_refused():
    queue, _ = filled([row(1e6)])
    assert queue.can_promise([row().entry(0.0)], 0.0, AT_ONCE)
    assert queue.can_promise([], 0.0, AT_ONCE)


def test_the_rows_of_a_request_are_promised_together():
    rows = [row(30.0 / PROMISED, within_s=0.1).entry(0.0) for _ in range(4)]
    queue = Queue(IN_ORDER)
    assert queue.can_promise(rows[:3], 0.0, AT_ONCE)
    assert not queue.can_promise(rows, 0.0, AT_ONCE)


def kept_promises(load: float, bounds: BatchBounds, seed: int) -> tuple[int, int, int]:
    """Requests accepted by `can_promise`, answered in time, and answered late, on one machine that takes as long as was
    predicted. `load` is the work that arrives over what can be done."""
    chance = random.Random(seed)
    queue = Queue(bounds)
    arrivals, at = [], 0.0
    for _ in range(300):
        at += chance.expovariate(load / 0.02)
        arrivals.append((at, row(chance.uniform(5, 35), within_s=chance.uniform(0.05, 1.0))))
    accepted = in_time = late = 0
    ends, running = NEVER, list[Entry]()
    while arrivals or running or len(queue):
        if arrivals and arrivals[0][0] < ends:
            now, want = arrivals.pop(0)
            entry = want.entry(now)
            if queue.can_promise([entry], now, AT_ONCE):
                accepted += 1
                queue.push(entry)
        else:
            now = ends if running else now
            for entry in running:
                queue.settle(entry)
                in_time += now <= entry.deadline + 1e-9
                late += now > entry.deadline + 1e-9
            running = []
        if not running:
            running = queue.take(now, AT_ONCE).batch
            ends = now + sum(entry.cost_ms for entry in running) / 1000 if running else NEVER
    return accepted, in_time, late


@pytest.mark.parametrize("load", [0.8, 2.0])
def test_accepted_promises_are_kept(load):
    """All, in order of deadlines; where rows of like length may go first, all but a few in a thousand."""
    for age_s, least in ((NEVER, 1.0), (MAX_AGE_S, 0.995)):
        bounds = BatchBounds(rows=64, tokens=10**9, max_age_s=age_s)
        accepted, in_time, late = map(sum, zip(*(kept_promises(load, bounds, seed) for seed in range(10)), strict=True))
        # Nothing is run in vain: what cannot make it any more is dropped, and what runs is in time.
        assert late == 0
        assert in_time >= least * accepted
        # What can be done is not refused.
        assert accepted > 0.9 * 10 * 300 / max(load, 1)


# Figures.


@given(st.floats(0, 1e6), st.floats(0.001, 1e6))
def test_what_is_refused_is_told_when_to_come_back(backlog, limit):
    wait = retry_after_s(backlog, limit)
    assert isinstance(wait, int)
    assert wait >= 1
    assert backlog - wait <= limit / 2 + 1e-6


def test_the_work_drains_by_pace_and_replicas():
    assert Speed().seconds(3000) == 3.0
    assert Speed(pace=2.0, replicas=4.0).seconds(3000) == 1.5


@given(st.floats(0.1, 10), st.floats(0, 1e9), st.floats(0, 1e9))
def test_the_pace_stays_within_its_bounds(pace, predicted, observed):
    assert 0.1 - 1e-9 <= corrected_pace(pace, predicted, observed) <= 10 + 1e-9


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_pace_converges_to_what_is_observed(pace, truth):
    for _ in range(200):
        pace = corrected_pace(pace, 100.0, 100.0 * truth)
    assert pace == pytest.approx(truth, rel=1e-3)


def test_one_outlier_moves_the_pace_little():
    assert corrected_pace(1.0, 1.0, 1e9) <= 2.0
    assert corrected_pace(1.0, 0.0, 5.0) == 1.0
