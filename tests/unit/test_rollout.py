"""When a new version gets more, and when it goes: on counts alone."""

from __future__ import annotations

import math
import random

import pytest
from pydantic import ValidationError

from fettle.config import RolloutConfig
from fettle.rollout import Compared, Position, Side, Tally, decide, findings, log_excess, share_of

CONFIG = RolloutConfig(path="new", steps=[0.05, 0.25, 0.5], hold_s=60, min_requests=200, min_compared=50)
RUNNING = Position(status="running", step=0, since=1000.0)
GOOD = Tally(old=Side(requests=4000), new=Side(requests=200), compared=Compared(rows=50))


def decided(position: Position, tallies: dict[int, Tally], at: float = 1060.0, **changes: object) -> Position:
    given = {"same_reference": True, "compares": True, **changes}
    return decide(position, tallies, at, given.pop("config", CONFIG), **given)


def test_a_version_that_is_not_ready_gets_nothing():
    waiting = Position(since=1000.0)
    assert decided(waiting, {}, ready=False) == waiting
    assert share_of(waiting, CONFIG) == 0.0
    begun = decided(waiting, {}, ready=True)
    assert (begun.status, share_of(begun, CONFIG)) == ("running", 0.05)


def test_one_that_does_not_load_is_rolled_back():
    waiting = Position(since=1000.0)
    broken = decided(waiting, {}, ready=False, failure="weights.bin: SHA-256 differs")
    assert (broken.status, share_of(broken, CONFIG)) == ("rolled back", 0.0)
    assert "weights.bin" in broken.reason
    late = decided(waiting, {}, at=1000.0 + CONFIG.ready_within_s + 1, ready=False)
    assert late.status == "rolled back"


def test_steps_are_taken_one_by_one_and_the_last_one_promotes():
    position, tallies, shares = RUNNING, {}, []
    for step in range(3):
        tallies[step] = GOOD
        position = decided(position, tallies, at=position.since + 60)
        shares.append(share_of(position, CONFIG))
    assert shares == [0.25, 0.5, 1.0]
    assert position.status == "promoted"
    assert decided(position, tallies, failure="anything") == position


@pytest.mark.parametrize(
    ("tally", "at"),
    [
        (GOOD, 1059.0),
        (GOOD.model_copy(update={"new": Side(requests=199)}), 1060.0),
        (GOOD.model_copy(update={"compared": Compared(rows=49)}), 1060.0),
    ],
    ids=["too soon", "too few requests", "too few comparisons"],
)
def test_a_step_takes_its_time_its_requests_and_its_comparisons(tally: Tally, at: float):
    assert decided(RUNNING, {0: tally}, at) == RUNNING


def test_comparisons_are_not_waited_for_where_there_are_none():
    alone = {0: GOOD.model_copy(update={"compared": Compared()})}
    assert decided(RUNNING, alone) == RUNNING
    assert decided(RUNNING, alone, compares=False).step == 1
    assert decided(RUNNING, alone, same_reference=False).step == 1


def test_failures_roll_back_and_the_reason_has_the_counts():
    failing = Tally(old=Side(requests=4000, failed=1), new=Side(requests=100, failed=6))
    ended = decided(RUNNING, {0: failing})
    assert ended.status == "rolled back"
    assert "6 of 100 requests failed, 1 of 4000" in ended.reason


def test_failures_that_both_have_alike_do_not():
    """Something that both need is broken: the new version is not to blame."""
    both = Tally(old=Side(requests=950, failed=475), new=Side(requests=50, failed=25))
    assert decided(RUNNING, {0: both}).status == "running"


def test_slow_answers_roll_back():
    slow = Tally(old=Side(requests=2000, slow=200), new=Side(requests=100, slow=80))
    ended = decided(RUNNING, {0: slow})
    assert (ended.status, ended.reason.partition(":")[0]) == ("rolled back", "latency")


def test_broken_promises_roll_back_where_the_reference_is_the_same():
    wrong = Compared(rows=200, differing=20)
    tally = GOOD.model_copy(update={"compared": wrong, "promised": {0.01: wrong}})
    ended = decided(RUNNING, {0: tally})
    assert (ended.status, ended.reason.partition(":")[0]) == ("rolled back", "wrong answers")
    assert decided(RUNNING, {0: tally}, same_reference=False).status == "running"


def test_another_reference_is_judged_by_the_disagreement_that_was_allowed():
    tally = GOOD.model_copy(update={"compared": Compared(rows=300, differing=90)})
    judged = CONFIG.model_copy(update={"max_disagreement": 0.1})
    assert decided(RUNNING, {0: tally}, same_reference=False).step == 1
    ended = decided(RUNNING, {0: tally}, same_reference=False, config=judged)
    assert "max_disagreement 0.1" in ended.reason


def test_doubt_holds_a_step_and_ends_nothing():
    doubtful = GOOD.model_copy(update={"new": Side(requests=200, failed=2)})
    found = findings({0: doubtful}, CONFIG, same_reference=True)
    assert 10 <= found.failures < found.alarm_at
    assert decided(RUNNING, {0: doubtful}) == RUNNING


def test_evidence_of_one_event_is_its_likelihood_ratio():
    share = 0.25
    chances = [share * ratio / (share * ratio + 1 - share) for ratio in (2, 4, 10)]
    assert math.exp(log_excess([(share, 0, 1)])) == pytest.approx(sum(chance / share for chance in chances) / 3)
    assert math.exp(log_excess([(share, 1, 0)])) == pytest.approx(
        sum((1 - chance) / (1 - share) for chance in chances) / 3
    )
    assert log_excess([]) == 0.0


def test_a_version_that_is_no_worse_is_rarely_rolled_back_however_often_one_looks():
    """Looked at after each of 300 events, at changing shares, in 200 rollouts; 1 % is allowed."""
    chance, alarms = random.Random(7), 0
    for _ in range(200):
        counts = [[0.05, 0, 0], [0.25, 0, 0], [0.5, 0, 0]]
        for number in range(300):
            step = counts[number // 100]
            step[2 if chance.random() < step[0] else 1] += 1
            if log_excess([tuple(each) for each in counts]) >= math.log(100):
                alarms += 1
                break
    assert alarms <= 6


def test_tallies_add_up():
    one = Tally(old=Side(requests=1), new=Side(requests=2, failed=1), promised={0.01: Compared(rows=1)})
    two = Tally(promised={0.01: Compared(rows=2, differing=1), 0.05: Compared(rows=3)}, compared=Compared(rows=5))
    both = one + two
    assert both.new == Side(requests=2, failed=1)
    assert both.promised == {0.01: Compared(rows=3, differing=1), 0.05: Compared(rows=3)}
    assert Tally.model_validate_json(both.model_dump_json()) == both


def test_steps_must_grow():
    with pytest.raises(ValidationError, match="steps must grow"):
        RolloutConfig(path="new", steps=[0.5, 0.25])
