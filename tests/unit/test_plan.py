"""`fettle plan`: processors, queues and cells in simulated time against theory; sizes, limits, the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fettle.bench.traffic import mix_of
from fettle.cli import app
from fettle.config import BatchConfig, FamilyConfig, GearConfig, ReplicaConfig, ServeConfig
from fettle.errors import UsageError
from fettle.family import Family
from fettle.manifest import Runtime
from fettle.menu import Menu
from fettle.plan.cell import Cell, ServingCosts, Setup, Simulated
from fettle.plan.cores import Cores, Process
from fettle.plan.engine_time import batch_seconds
from fettle.plan.limits import tiers
from fettle.plan.sizing import Node, Objective, capacity, demand, nodes_for, percentile, simulate, size
from fettle.plan.workload import Ways, arrivals, mixed
from tests.fakes import FakeVariant, make_fake_family, make_point, make_step

FREE = ServingCosts(proxy=0, intake=0, reply=0, batch=0, replica=0, beside=0, wire=0, background=0)
LENGTH = 20


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """`exact` takes 40 ms a row of 20 tokens, 1 % takes 4 and a tenth of the rows goes on, 5 % takes 4."""
    return make_fake_family(
        tmp_path_factory.mktemp("plan") / "family",
        name="planned",
        variants=[FakeVariant("fp32", ms_per_token=2.0), FakeVariant("int8", ms_per_token=0.2)],
        points=[
            make_point("one", 0.01, make_step("int8", 0.5), make_step("fp32"), cost=10.0),
            make_point("five", 0.05, make_step("int8"), cost=4.0),
        ],
    )


def setup_of(family: Family, mix: str, costs: ServingCosts = FREE, **replicas: int) -> Setup:
    config = ServeConfig(
        families=[FamilyConfig(path=str(family.directory))],
        replicas=ReplicaConfig(prefetch=1),
        gears=GearConfig(objective_ms=1e6),
        batch=BatchConfig(max_rows=1),
    )
    return Setup(family, mixed(mix_of(mix)), replicas or {"fp32": 1, "int8": 1}, [LENGTH], config, costs)


def every(seconds: float) -> Iterator[tuple[float, int, int]]:
    return ((number * seconds, 0, number) for number in range(10**6))


def run_out(cores: Cores) -> None:
    while cores.next_at < float("inf"):
        cores.finish()


# Processors


def ended(log: dict[str, float], name: str) -> Callable[[float], None]:
    return lambda now: log.__setitem__(name, now)


def test_processes_share_a_core_evenly_and_work_is_conserved():
    cores, log = Cores(1), {}
    first, second = Process(cores), Process(cores)
    first.add(1.0, ended(log, "first"), 0.0)
    second.add(2.0, ended(log, "second"), 0.0)
    run_out(cores)
    # Half each until 2 s, then the second alone.
    assert log == pytest.approx({"first": 2.0, "second": 3.0})


def test_weights_follow_niceness_and_nobody_gets_more_than_a_core():
    cores, log = Cores(2), {}
    router, one, two = Process(cores), Process(cores, niceness=5), Process(cores, niceness=5)
    for name, process in (("router", router), ("one", one), ("two", two)):
        process.add(1.0, ended(log, name), 0.0)
    run_out(cores)
    # The router has a core of its own, since its share would be more; the others halve the second one.
    assert log["router"] == pytest.approx(1.0)
    assert log["one"] == pytest.approx(1.5)


def test_a_process_does_one_thing_after_the_other():
    cores, log = Cores(4), {}
    process = Process(cores)
    process.add(1.0, ended(log, "a"), 0.0)
    process.add(1.0, ended(log, "b"), 0.0)
    run_out(cores)
    assert log == pytest.approx({"a": 1.0, "b": 2.0})


def test_threads_use_as_many_cores():
    cores, log = Cores(4), {}
    Process(cores, threads=2).add(1.0, ended(log, "a"), 0.0)
    run_out(cores)
    assert log["a"] == pytest.approx(0.5)


def test_padding_costs_what_the_longest_row_does_and_nothing_in_a_packed_graph(family, monkeypatch):
    def seconds() -> float:
        return batch_seconds(family, "int8", ReplicaConfig(), 1.0)([(20, (1.0,)), (60, (1.0,))])

    onnx = family.variant("int8").model_copy(update={"runtime": Runtime.ONNX})
    monkeypatch.setitem(family.variants, "int8", onnx)
    assert seconds() == pytest.approx(0.0002 * 2 * 60)
    monkeypatch.setitem(family.variants, "int8", onnx.model_copy(update={"packed": True}))
    assert seconds() == pytest.approx(0.0002 * (20 + 60))


# A cell


def test_without_waiting_a_request_takes_its_own_time(family):
    found = Cell(setup_of(family, "exact")).run(every(1.0), 10.0)
    assert found.ms == pytest.approx(40.0)
    costs = ServingCosts(proxy=1, intake=2, reply=4, batch=8, replica=16, wire=32, background=0)
    found = Cell(setup_of(family, "exact", costs)).run(every(1.0), 10.0)
    assert found.ms == pytest.approx(40.0 + 1 + 2 + 4 + 8 + 16 + 2 * 32)


def test_the_mean_wait_is_that_of_the_pollaczek_khinchine_formula(family):
    """One server, constant service, Poisson arrivals at a load of 0.5: half a service time more on average."""
    setup = setup_of(family, "int8", fp32=1, int8=1)
    found = Cell(setup).run(arrivals(setup.asked, 125.0, 1, seed=3), 60.0)
    assert found.ms.mean() == pytest.approx(4.0 * (1 + 0.5 / (2 * 0.5)), rel=0.06)
    assert found.busy["int8"] == pytest.approx(0.5, rel=0.05)


def test_rows_go_on_as_often_as_they_did_on_test(family):
    setup = setup_of(family, "0.01", fp32=8, int8=8)
    found = Cell(setup).run(every(0.02), 20.0)
    assert found.points == ["one"]
    # `make_point` says that half of the rows pass an open gate.
    assert (found.ms > 30).mean() == pytest.approx(0.5, abs=0.05)
    assert Ways(family).mean(Menu(family, ["fp32", "int8"]).points[0]) == pytest.approx({"int8": 1.0, "fp32": 0.5})


def test_a_stage_costs_its_calls_however_few_rows_are_left_for_it(tmp_path):
    """Two stages of 20 ms a call, whatever is in it; one row, and two that wait for it: half leave after one stage."""
    family = make_fake_family(
        tmp_path / "staged",
        variants=[FakeVariant("fp32", ms_per_token=2.0), FakeVariant("exits", ms_per_call=40.0, stages=2)],
        points=[make_point("one", 0.01, make_step("exits", 0.5, 0.0), cost=10.0)],
    )
    setup = setup_of(family, "0.01", fp32=1, exits=1)
    setup = replace(setup, config=setup.config.model_copy(update={"batch": BatchConfig(max_rows=2)}))
    coming = ((number * 0.2 + behind, 0, number) for number in range(10**6) for behind in (0.0, 1e-6, 2e-6))
    found = Cell(setup).run(coming, 40.0)
    assert found.rows_a_batch["exits"] > 1.0
    assert {round(ms) % 20 for ms in found.ms} == {0}


def test_the_same_seed_gives_the_same_answers(family):
    setup = setup_of(family, "exact=0.1,0.01=0.9", fp32=2, int8=2)
    one, two = (simulate(setup, 20.0, seed=5, requests=200) for _ in range(2))
    assert np.array_equal(one.ms, two.ms)


def test_pressure_shifts_to_cheaper_points_and_overload_is_refused(family):
    setup = setup_of(family, "0.05", fp32=1, int8=1)
    config = setup.config.model_copy(update={"gears": GearConfig(objective_ms=100.0)})
    calm, busy = (simulate(replace(setup, config=config), rate, requests=1000) for rate in (5.0, 180.0))
    assert calm.points == ["one"]
    assert (busy.point == busy.points.index("five")).mean() > 0.9
    assert busy.refused == 0
    assert simulate(replace(setup, config=config), 400.0, requests=1000).refused > 0.2


def test_a_client_on_the_same_cores_takes_its_part(family):
    alone = replace(setup_of(family, "int8", fp32=1, int8=1), cores=1.0)
    crowded = replace(alone, client_ms=2.0)
    assert np.mean(simulate(crowded, 100.0, requests=800).ms) > np.mean(simulate(alone, 100.0, requests=800).ms) + 2.0


# Sizes


def test_what_ray_does_for_itself_comes_in_bursts_and_slows_whom_it_meets(family):
    """A tenth of a second of a core each half second; a replica yields to it by its niceness, and else takes 4 ms."""
    setup = replace(setup_of(family, "int8"), cores=1.0, costs=replace(FREE, background=0.2))
    ms = Cell(setup).run(every(0.025), seconds=10).ms
    assert ms.min() == pytest.approx(4.0, rel=0.01)
    assert ms.max() == pytest.approx(4.0 * (1 + 1.25**5), rel=0.01)
    assert 0.15 < (ms > 6).mean() < 0.3


def test_capacity_is_what_a_server_bears(family):
    """Four milliseconds a row on one replica, and a tenth of a second to wait: nearly 250 a second."""
    setup = setup_of(family, "int8", fp32=1, int8=1)
    assert capacity(setup, Objective(100.0), requests=700) == pytest.approx(245, rel=0.15)
    # Ten milliseconds leave room for few others.
    assert capacity(setup, Objective(10.0), requests=400) < 170
    assert capacity(setup, Objective(3.0), requests=100) == 0.0


def test_demand_is_what_rows_take(family):
    needs = demand(setup_of(family, "exact=0.25,0.05=0.75"), 100.0)
    assert needs == pytest.approx({"fp32": 0.25 * 100 * 0.04, "int8": 0.75 * 100 * 0.004}, rel=0.01)


def test_more_load_takes_more_and_millions_cost_no_more_time(family):
    setup = setup_of(family, "0.05", ServingCosts(intake=6, reply=4, batch=4), int8=1)
    setup = replace(setup, config=setup.config.model_copy(update={"gears": GearConfig(objective_ms=200.0)}))
    sizes = [size(setup, rate, Objective(200.0), requests=300) for rate in (20.0, 2_000_000.0)]
    assert all(found.kept for found in sizes)
    small, large = sizes
    assert (small.cells, small.routers) == (1, 1)
    assert large.cells * large.rate == pytest.approx(2_000_000)
    assert large.cells * large.replicas["int8"] > 2_000_000 * 0.004


def test_what_is_out_of_reach_is_said(family):
    assert not size(setup_of(family, "exact"), 10.0, Objective(20.0), requests=100).kept


def test_nodes_hold_cores_and_gpus():
    assert nodes_for(17, 0, Node(8)) == 3
    assert nodes_for(4, 9, Node(64, gpus=4)) == 3
    with pytest.raises(UsageError, match="--gpus-per-node"):
        nodes_for(4, 1, Node(8))


def test_percentiles_are_of_the_nearest_rank():
    assert percentile(np.arange(1.0, 101.0), 99) == 99.0
    assert percentile(np.empty(0), 99) == 0.0


def test_where_tiers_end():
    costs = ServingCosts(intake=1, reply=0.5, batch=0.5, proxy=0.1)
    small = tiers(100.0, routers=1, replicas=4, nodes=1, costs=costs)
    assert (small.router_rps, small.clusters, small.proxies) == (350.0, 1, 1)
    large = tiers(1e6, routers=3000, replicas=17_000, nodes=1500, costs=costs)
    assert (large.clusters, large.cluster_rps) == (2, 500_000.0)
    assert "2 clusters" in large.words[-1]


# The command


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments), "--requests", "300"])


def test_a_plan_for_each_mix_and_for_the_reference_alone(family):
    ran = plan(
        family.directory, "--rate", 300, "--latency", 250, "--mix", "0.05", "--mix", "exact=0.5,0.05=0.5",
        "--cores-per-node", 4, "--price-per-node-hour", 0.36, "--json",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    cheap, half, dear = *found["plans"], found["reference_alone"]
    assert [row["kept"] for row in (cheap, half, dear)] == [True] * 3
    assert cheap["nodes"] < half["nodes"] < dear["nodes"]
    assert dear["replicas"] == {"fp32": dear["replicas"]["fp32"]}
    assert cheap["cost_per_million"] == pytest.approx(cheap["nodes"] * 0.36 / (300 * 3600 / 1e6), rel=1e-3)
    assert set(half["latency_ms"]) == {"exact", "0.05"}
    assert half["points"]["exact"] == {"fp32": 1.0}
    assert sum(cheap["histogram"]["share"]) == pytest.approx(1.0, abs=0.01)


def test_a_plan_as_a_table(family):
    ran = plan(family.directory, "--rate", 20, "--latency", 250)
    assert ran.exit_code == 0, ran.output
    assert "the reference alone" in ran.stdout
    assert "a router is one process" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--rate", 0, "--latency", 10], "--rate"),
        (["--rate", 5, "--latency", "inf"], "--latency"),
        (["--rate", 5, "--latency", 10, "--mix", "gold"], "gold"),
        (["--rate", 5, "--latency", 10, "--mix", "7"], "no share"),
        (["--rate", 5, "--latency", 10, "--threads", 4], "--threads 4"),
    ],
)
def test_what_cannot_be_planned_is_one_line(family, arguments, word):
    ran = plan(family.directory, *arguments)
    assert ran.exit_code == 2
    assert word in ran.stderr


def test_a_family_that_writes_is_refused(tmp_path: Path):
    from tests.texts import make_text_family

    make_text_family(tmp_path / "lm")
    ran = plan(tmp_path / "lm", "--rate", 5, "--latency", 10)
    assert (ran.exit_code, "generates text" in ran.stderr) == (2, True)


def test_everything_that_came_is_accounted_for(family):
    found: Simulated = simulate(setup_of(family, "0.05", fp32=1, int8=1), 50.0, requests=300)
    assert len(found.ms) == len(found.came) == len(found.point)
    assert found.refused == 0
    assert np.isfinite(found.ms).all()
