"""Autoscaling in Serve's controller: what Ray's own state hands to the policy, and what it does with the answer."""

from __future__ import annotations

import time

import pytest
from ray import cloudpickle
from ray.serve._private.autoscaling_state import AutoscalingStateManager
from ray.serve._private.common import (
    RUNNING_REQUESTS_KEY,
    DeploymentID,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.config import ReplicaConfig as RayReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingPolicy

from deployments import scaling
from deployments.autoscaling import Application, EachDeployment
from deployments.scaling import ROUTER, scaling_config
from fettle.config import AutoscaleConfig

APP = "fettle"
BUSY, REST = (DeploymentID(name, APP) for name in ("family.busy", "family.rest"))
ROUTERS = DeploymentID(ROUTER, APP)
SETTINGS = AutoscaleConfig(target_utilisation=0.8, down_delay_s=10, zero_delay_s=10)


class Serve:
    """Ray's autoscaling state with three deployments of ours; `tick` is what its controller does again and again."""

    def __init__(self, *, application: bool, memory_bytes: int | None = None) -> None:
        settings = SETTINGS.model_copy(update={"memory_bytes": memory_bytes})
        self.manager = AutoscalingStateManager()
        if application:
            policy = AutoscalingPolicy(policy_function="deployments.autoscaling:Application")
            self.manager.register_application(APP, policy)
        self.targets = {BUSY: 1, REST: 1, ROUTERS: 1}
        for deployment in self.targets:
            least, most = (1, 3) if deployment == ROUTERS else (0, 20)
            config = scaling_config(least, most, settings, memory=100)
            info = DeploymentInfo(
                deployment_config=DeploymentConfig(autoscaling_config=config),
                replica_config=RayReplicaConfig.create(object),
                start_time_ms=0,
                deployer_job_id="",
            )
            self.manager.register_deployment(deployment, info, 1)
        self.run_all()

    def run_all(self) -> None:
        """What was asked for runs."""
        for deployment, count in self.targets.items():
            running = [ReplicaID(f"{deployment.name}{number}", deployment) for number in range(count)]
            self.manager.update_running_replica_ids(deployment, running)

    def report(self, router: str = "0", *, at: float, **figures: list[float]) -> None:
        """A router's series, one value a second until `at`."""
        series = {
            name.replace("__", "|").replace("_busy", ".busy").replace("_rest", ".rest"): [
                TimeStampedValue(at - (len(values) - 1 - place), value) for place, value in enumerate(values)
            ]
            for name, values in figures.items()
        }
        self.hear(ReplicaID(f"{ROUTER}{router}", ROUTERS), at, series)

    def hear(self, replica: ReplicaID, at: float, series: dict[str, list[TimeStampedValue]]) -> None:
        report = ReplicaMetricReport(replica_id=replica, timestamp=at, metrics=series)
        self.manager.record_request_metrics_for_replica(report)

    def tick(self) -> dict[DeploymentID, int]:
        decided = self.manager.get_decision_num_replicas(APP, dict(self.targets))
        self.targets |= decided
        return self.targets


@pytest.fixture
def now(monkeypatch):
    """The policy's clock; Ray's own runs on."""
    begin = time.time()
    at = [begin]
    monkeypatch.setattr(scaling, "_scalings", {APP: scaling.Scaling(lambda: at[0])})
    return at


def figures(busy: float, rest: float = 0.0, *, seconds: int = 16, router: float = 0.05, waits: float = 0.0):
    """Counters that grow by so much a second."""
    return {
        "router__work_s": [router * second for second in range(seconds)],
        "router__rows": [10.0 * second for second in range(seconds)],
        "family_busy__work_s": [busy * second for second in range(seconds)],
        "family_busy__rows": [100 * busy * second for second in range(seconds)],
        "family_busy__backlog_s": [0.0] * seconds,
        "family_busy__waiting": [waits] * seconds,
        "family_busy__batches": [0.0] * seconds,
        "family_rest__work_s": [rest * second for second in range(seconds)],
        "family_rest__rows": [100 * rest * second for second in range(seconds)],
        "family_rest__backlog_s": [0.0] * seconds,
        "family_rest__waiting": [0.0] * seconds,
        "family_rest__batches": [0.0] * seconds,
    }


@pytest.fixture(params=[True, False], ids=["application", "each"])
def serve(request, now) -> Serve:
    return Serve(application=request.param)


def test_all_deployments_and_the_routers_are_sized_from_what_the_routers_report(serve, now):
    serve.report(at=now[0], **figures(4.0, 1.0, router=1.5))
    serve.tick()
    now[0] += 1
    assert serve.tick() == {BUSY: 6, REST: 2, ROUTERS: 2}


def test_several_routers_add_up_and_one_that_is_silent_counts_as_the_others(serve, now):
    serve.targets[ROUTERS] = 2
    serve.run_all()
    serve.report("0", at=now[0], **figures(2.0))
    serve.report("1", at=now[0], **figures(2.0))
    serve.tick()
    now[0] += 1
    assert serve.tick()[BUSY] == 6
    serve.targets[ROUTERS] = 3
    serve.run_all()
    for _ in range(3):
        now[0] += 1
        serve.tick()
    assert serve.targets[BUSY] == 8


def test_nothing_changes_while_no_router_reports(serve, now):
    for _ in range(60):
        assert serve.tick() == {BUSY: 1, REST: 1, ROUTERS: 1}
        now[0] += 1
    serve.report(at=now[0] - 30, **figures(4.0))
    serve.tick()
    now[0] += 1
    assert serve.tick()[BUSY] == 1, "a report that old says nothing of now"


def test_to_nothing_and_back(serve, now):
    for _ in range(40):
        serve.report(at=now[0], **figures(0.0, 1.0))
        serve.tick()
        serve.run_all()
        now[0] += 1
    assert serve.targets[BUSY] == 0
    assert serve.targets[REST] == 2
    serve.report(at=now[0], **figures(0.0, 1.0, waits=1.0))
    serve.tick()
    now[0] += 1
    assert serve.tick()[BUSY] == 1


def test_what_ray_counts_is_not_looked_at(serve, now):
    """Streams that Ray believes to be under way (its issue 61551) keep nothing up."""
    for _ in range(40):
        stuck = ReplicaID("family.busy0", BUSY)
        series = {RUNNING_REQUESTS_KEY: [TimeStampedValue(now[0], 50.0)]}
        serve.hear(stuck, now[0], series)
        serve.report(at=now[0], **figures(0.0, 1.0))
        serve.tick()
        serve.run_all()
        now[0] += 1
    assert serve.targets[BUSY] == 0


def test_a_start_by_ray_itself_is_not_undone_by_an_older_decision(serve, now):
    for _ in range(40):
        serve.report(at=now[0], **figures(0.0, 1.0))
        serve.tick()
        serve.run_all()
        now[0] += 1
    assert serve.targets[BUSY] == 0
    # A call waits at a handle: Ray starts one before any policy is asked.
    serve.targets[BUSY] = 1
    serve.run_all()
    serve.report(at=now[0], **figures(0.0, 1.0, waits=1.0))
    for _ in range(30):
        assert serve.tick()[BUSY] == 1
        now[0] += 0.1


def test_decisions_are_kept_with_their_reasons_and_memory_bounds_them(now):
    serve = Serve(application=True, memory_bytes=500)
    serve.report(at=now[0], **figures(9.0))
    serve.tick()
    now[0] += 1
    assert serve.tick()[BUSY] == 3
    [(_, decision)] = scaling.scaling_of(APP).decisions
    assert (decision.deployment, decision.before, decision.replicas, decision.cause) == ("family.busy", 1, 3, "memory")
    assert "there is memory for 3" in decision.reason


@pytest.mark.parametrize("kind", [Application, EachDeployment])
def test_the_policies_travel_to_the_controller(kind):
    policy = AutoscalingPolicy(policy_function=f"deployments.autoscaling:{kind.__name__}")
    assert cloudpickle.loads(policy.get_serialized_policy_def()).__name__ == kind.__name__


def test_a_deployment_says_whose_policy_and_which_dials():
    config = scaling_config(0, 8, replace_down(SETTINGS, 7.0), memory=5)
    assert (config.min_replicas, config.max_replicas) == (0, 8)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0, 0, 0)
    assert config.policy.policy_kwargs["autoscale"]["down_delay_s"] == 7.0
    assert config.policy.policy_kwargs["memory"] == 5


def replace_down(config: AutoscaleConfig, delay: float) -> AutoscaleConfig:
    return config.model_copy(update={"down_delay_s": delay})
