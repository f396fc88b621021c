"""Faults in a cluster of hosts under a steady load: what each costs the requests, and how long it takes to pass.

    python -m benchmarks.faults                        (root; Redis; four minutes of starting, ten of faults)
    python -m benchmarks.faults --only host,head

Fake engines behind the product's own routers, batchers and deployments, on a Ray cluster of hosts of their own (see
`benchmarks.hosts`). A request counts as hurt if it failed, or took longer than `--late` seconds; a fault has passed
when the last one that it hurt has its answer. It may be answered late; it must not be lost, nor answered twice.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from benchmarks import ledger, one_network
from benchmarks.cluster import GCS_PORT, HTTP_PORT, Cluster
from benchmarks.hosts import HostError, Network, wait_for, why_not
from benchmarks.machine import describe_machine, machine_lines
from fettle.config import FamilyConfig, MonitorConfig, ReplicaConfig, ServeConfig

WORKERS = 3
CUT_S, AWAY_S = 20.0, 30.0
CALM_BEFORE_S, CALM_AFTER_S = 8.0, 12.0
RECOVER_S = 300.0
STALLED = "original"
WISHES: tuple[dict[str, Any], ...] = ({"max_disagreement": "exact"}, {}, {"max_disagreement": 0.05})


@dataclass(frozen=True, slots=True)
class Fault:
    """`strike` returns when the worst is done and names what happened; `restored` says when all is as it was."""

    name: str
    strike: Callable[[Cluster], str]
    restored: Callable[[Cluster], bool]
    entries: Callable[[Cluster], list[str]]


def family(directory: Path) -> Path:
    """A family of fake engines: an original and two cheaper variants, all with the same answers."""
    from tests.fakes import FakeVariant, embed_task, make_fake_family, make_point, make_step

    variants = [
        FakeVariant(STALLED, ms_per_call=8.0, ms_per_token=0.02, stall_file=str(directory / "stall")),
        FakeVariant("int8", ms_per_call=4.0),
        FakeVariant("pruned", ms_per_call=2.0),
    ]
    points = [
        make_point("within-0.01", 0.01, make_step("int8"), cost=2.0),
        make_point("within-0.05", 0.05, make_step("pruned"), cost=1.0),
    ]
    made = directory / "family"
    make_fake_family(made, name="vectors", task=embed_task(16), variants=variants, points=points)
    return made


def settings(family: Path) -> ServeConfig:
    return ServeConfig(
        families=[FamilyConfig(path=str(family))],
        replicas=ReplicaConfig(min_replicas=2, max_replicas=2, max_per_node=1),
        routers=2,
        routers_per_node=1,
        monitor=MonitorConfig(share=0.0),
    )


# What happens.


def victim(cluster: Cluster) -> str:
    """The worker with the most replicas, a router among them."""
    placed = cluster.placed()
    ranked = sorted(
        (name for name in cluster.workers if cluster.host(name).is_up),
        key=lambda name: (placed[name].get("RouterIngress", 0) > 0, sum(placed[name].values())),
    )
    return ranked[-1]


def kill_host(cluster: Cluster) -> str:
    name = victim(cluster)
    there = cluster.placed()[name]
    cluster.host(name).kill()
    return f"{name} with {_said(there)}"


def cut_host(cluster: Cluster) -> str:
    name = victim(cluster)
    there = cluster.placed()[name]
    cluster.host(name).cut()
    time.sleep(CUT_S)
    cluster.host(name).mend()
    return f"{name} with {_said(there)}, for {CUT_S:g} s"


def stall_replica(cluster: Cluster) -> str:
    """The next replica of the original that is asked never returns; every other one goes on."""
    before = originals(cluster)
    (cluster.directory / "stall").touch()
    wait_for(lambda: not (cluster.directory / "stall").exists(), 30.0, "a replica stalls", every_s=0.02)
    wait_for(lambda: not before <= originals(cluster), RECOVER_S, "the stalled replica ends")
    return f"one of two replicas of {STALLED}"


def freeze_replica(cluster: Cluster) -> str:
    """SIGSTOP: the process is there, and answers nothing, health checks included."""
    chosen = min(originals(cluster))
    os.kill(chosen, signal.SIGSTOP)
    wait_for(lambda: chosen not in originals(cluster), RECOVER_S, "Serve ends the frozen replica")
    return f"one of two replicas of {STALLED}"


def add_host(cluster: Cluster) -> str:
    """Returns when the head knows it."""
    host = cluster.add_worker()
    return host.name


def drain_host(cluster: Cluster) -> str:
    """Ray moves what is on the host, and then the host goes."""
    name = victim(cluster)
    host, there = cluster.host(name), cluster.placed()[name]
    (node,) = [node["node_id"] for node in nodes(cluster) if node["node_ip"] == host.address and _is_alive(node)]
    cluster.run(
        cluster.head,
        *("ray", "drain-node", f"--address={cluster.head.address}:{GCS_PORT}", f"--node-id={node}"),
        *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=maintenance", "--deadline-remaining-seconds=600"),
    )
    wait_for(lambda: not cluster.replicas(host), RECOVER_S, "everything has left the host")
    host.kill()
    return f"{name} with {_said(there)}"


def kill_head(cluster: Cluster) -> str:
    """The head's host dies, Serve's controller with it, and comes back as an empty one."""
    cluster.head.kill()
    time.sleep(AWAY_S)
    cluster.restart_head()
    return f"the head's host, back after {AWAY_S:g} s"


def kill_store(cluster: Cluster) -> str:
    """Redis dies, and comes back with its disk. A head that did not survive that is started anew."""
    store = cluster.host("store")
    store.kill()
    time.sleep(AWAY_S)
    store.boot()
    cluster.start_store()
    if any("gcs_server" in " ".join(process.cmdline()) for process in cluster.head.processes()):
        return f"Redis, back after {AWAY_S:g} s; the head went on"
    cluster.restart_head()
    return f"Redis, back after {AWAY_S:g} s; the head had ended itself, and was started anew"


def originals(cluster: Cluster) -> set[int]:
    """Process numbers of the original's replicas."""
    return {pid for name in cluster.workers for pid in cluster.replicas(cluster.host(name), f"vectors.{STALLED}")}


def nodes(cluster: Cluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.ask("/api/v0/nodes")["data"]["result"]["result"]
    return found


def _is_alive(node: dict[str, Any]) -> bool:
    return bool(node["state"] == "ALIVE")


def _said(there: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.rpartition('.')[2]}" for name, count in sorted(there.items()))


def all_running(cluster: Cluster) -> bool:
    """Every deployment has the replicas that it should have, on hosts that are up."""
    try:
        placed = cluster.placed()
    except OSError:
        return False
    wanted = {"RouterIngress": 2, **{f"vectors.{variant}": 2 for variant in (STALLED, "int8", "pruned")}}
    return all(
        sum(placed[name].get(deployment, 0) for name in cluster.network.hosts if cluster.host(name).is_up) >= count
        for deployment, count in wanted.items()
    )


def by_head(cluster: Cluster) -> list[str]:
    return [f"{cluster.head.address}:{HTTP_PORT}"]


def by_workers(cluster: Cluster) -> list[str]:
    """As a load balancer would that knows which hosts have a proxy."""
    placed = cluster.placed()
    return [f"{cluster.host(name).address}:{HTTP_PORT}" for name in cluster.workers if any(placed[name].values())]


FAULTS = {
    "stall": Fault("a replica in an endless loop", stall_replica, all_running, by_head),
    "cut": Fault("a worker cut off for 20 s", cut_host, all_running, by_head),
    "kill": Fault("a worker killed (SIGKILL)", kill_host, all_running, by_head),
    "add": Fault("a worker added", add_host, all_running, by_head),
    "drain": Fault("a worker drained", drain_host, all_running, by_head),
    "freeze": Fault("a replica frozen (SIGSTOP)", freeze_replica, all_running, by_head),
    "head": Fault("the head killed, away 30 s", kill_head, all_running, by_workers),
    "store": Fault("the head's Redis killed, away 30 s", kill_store, all_running, by_workers),
}


def measure(cluster: Cluster, fault: Fault, book: Path, rate: float, late_s: float) -> dict[str, Any]:
    """One fault under load."""
    wait_for(lambda: all_running(cluster), RECOVER_S, "all replicas are there before the fault")
    plan = ledger.Plan(str(cluster.directory / "family"), tuple(fault.entries(cluster)), str(book), WISHES, rate)
    with ledger.keeping(plan):
        time.sleep(CALM_BEFORE_S)
        struck, clock = time.time(), time.monotonic()
        what = fault.strike(cluster)
        wait_for(lambda: fault.restored(cluster), RECOVER_S, f"all is as it was after: {fault.name}")
        restored_s = time.monotonic() - clock
        time.sleep(CALM_AFTER_S)
    found = ledger.account(ledger.read(str(book)), struck, late_s)
    return {"fault": fault.name, "what": what, "restored_s": round(restored_s, 1), **found}


@contextmanager
def started(directory: Path, *, apart: bool) -> Iterator[Cluster]:
    """The cluster with the service on it; `apart`: of hosts with networks of their own."""
    config = settings(family(directory))
    if not apart:
        with one_network.started(directory, config, WORKERS) as nodes:
            yield cast(Cluster, nodes)
        return
    with Network(directory / "hosts") as network:
        cluster = Cluster(network, directory)
        cluster.start(WORKERS)
        cluster.deploy(config)
        yield cluster


def run(options: argparse.Namespace, directory: Path, *, apart: bool) -> list[dict[str, Any]]:
    reports = []
    with started(directory, apart=apart) as cluster:
        for name in options.only:
            if not apart and name not in one_network.FAULTS:
                reports.append({"fault": FAULTS[name].name, "error": "takes hosts with networks of their own"})
                continue
            try:
                reports.append(measure(cluster, FAULTS[name], directory / f"{name}.jsonl", options.rate, options.late))
            except HostError as error:
                reports.append({"fault": FAULTS[name].name, "error": str(error)})
            if not options.json:
                print(json.dumps(reports[-1]), flush=True)
    return reports


def table(reports: Sequence[dict[str, Any]]) -> Table:
    made = Table("fault")
    for column in (
        "sent",
        "failed",
        "twice",
        "wrong",
        "late",
        "longest s",
        "passed after s",
        "restored after s",
    ):
        made.add_column(column, justify="right")
    for report in reports:
        if "error" in report:
            made.add_row(report["fault"], report["error"])
            continue
        failed = sum(report["others"].values())
        cells = (report["sent"], failed, report["twice"], report["wrong"], report["late"], report["longest_s"])
        made.add_row(report["fault"], *(str(cell) for cell in (*cells, report["hurt_s"], report["restored_s"])))
    return made


def is_kept(report: dict[str, Any]) -> bool:
    """Whether no request was lost, answered twice or answered wrongly."""
    return "error" not in report and not (report["others"] or report["twice"] or report["wrong"])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--late", type=float, default=1.0, help="seconds above which a request counts as late")
    parser.add_argument("--one-network", action="store_true", help="Ray's own several nodes, without namespaces")
    parser.add_argument("--directory", type=Path, help="for logs and books, kept; a temporary one without it")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    reason = "asked for" if options.one_network else why_not()
    if reason is not None:
        print(f"Ray's own nodes on one network instead of hosts of their own: {reason}", file=sys.stderr)
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    with tempfile.TemporaryDirectory(prefix="fettle-faults-") as scratch:
        directory = options.directory or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        reports = run(options, directory.resolve(), apart=reason is None)
    if not options.json:
        Console(width=140).print(table(reports))
    print(json.dumps({"benchmark": "faults", "hardware": machine, "rate": options.rate, "faults": reports}))
    sys.exit(0 if all(map(is_kept, reports)) else 1)


if __name__ == "__main__":
    main()
