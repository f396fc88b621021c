"""The simulated fleet that autoscaling is measured in: nothing is lost, replicas take their time, the oracle holds."""

from __future__ import annotations

import time

import pytest
from ray.serve import autoscaling_policy as ray_policy
from ray.serve.config import AutoscalingConfig

from benchmarks.fleet import ROUTERS, Fleet, Kind, Scene, Stream
from benchmarks.scalers import FINE, Fettle, Plan, Ray, oracle

KINDS = {
    "small": Kind("small", row_s=0.02, start_s=5.0, batch_s=0.1),
    "large": Kind("large", row_s=0.1, start_s=5.0, batch_s=0.1),
}
WAYS = (Stream(0.9, (("small", 1.0), ("large", 0.2))), Stream(0.1, (("large", 1.0),)))
# From 20 to 100 requests a second within half a minute.
SCENE = Scene(KINDS, WAYS, ((0.0, 20.0), (30.0, 20.0), (60.0, 100.0), (120.0, 100.0)), objective_s=0.5)
BEGIN = {"small": 1, "large": 1, ROUTERS: 1}


def planned(counts: dict[str, int]) -> Plan:
    return Plan({name: [count] * SCENE.seconds for name, count in counts.items()})


@pytest.mark.parametrize("scaler", [Fettle(), planned(BEGIN), Ray(AutoscalingConfig(max_replicas=50), calls=True)])
def test_every_request_ends_once(scaler):
    trace = Fleet(SCENE, scaler, BEGIN).run()
    assert sum(trace.came) == sum(trace.good) + sum(trace.late) + sum(trace.refused)
    assert sum(trace.came) > 5000


def test_the_policy_follows_and_too_few_replicas_do_not():
    few = Fleet(SCENE, planned(BEGIN), BEGIN).run()
    own = Fleet(SCENE, Fettle(), BEGIN).run()
    assert sum(few.good) < 0.6 * sum(few.came)
    assert sum(own.good) > 0.8 * sum(own.came)
    assert max(own.wanted["large"]) > 2


def test_a_replica_takes_its_time_and_counts_from_when_it_is_asked_for():
    more = Plan({"small": [1] * 10 + [3] * 110, "large": [4] * 120, ROUTERS: [1] * 120})
    trace = Fleet(SCENE, more, {**BEGIN, "large": 4}).run()
    assert (trace.running["small"][14], trace.running["small"][16]) == (1, 3)
    assert trace.replica_s["small"] == 10 + 3 * 110


def test_replicas_that_go_finish_their_batch():
    fewer = Plan({"small": [6] * 60 + [1] * 60, "large": [8] * 120, ROUTERS: [1] * 120})
    trace = Fleet(SCENE, fewer, {"small": 6, "large": 8, ROUTERS: 1}).run()
    assert sum(trace.came) == sum(trace.good) + sum(trace.late) + sum(trace.refused)
    assert trace.running["small"][70] == 1


def test_the_oracle_has_replicas_when_they_are_needed_and_no_earlier_than_a_start_takes():
    work = {"small": [0.05] * (20 * FINE) + [0.35] * (20 * FINE)}
    plan = oracle(SCENE, work, 0.1)
    wanted = plan.wanted["small"]
    assert wanted[:15] == [1] * 15
    assert wanted[15:] == [4] * 25


def test_rays_policy_gets_its_own_clock_back():
    Ray(AutoscalingConfig(), calls=False).decide(5.0, [])
    assert ray_policy.time is time
