"""Do the dashboards and the alerts show anything? Every query of them, asked of a real Prometheus after real load.

Starts a service with the families that are given, Debian's Prometheus with deploy/prometheus as it is shipped, and
clients of all kinds: every class, every variant by name, streams and whole texts, errors, refusals, deadlines that
cannot be met, a key at its limit, a replica that is killed. Then it asks Prometheus for each panel of deploy/grafana,
for each variant where the panel is about one, and evaluates each alert. The exit status is 1 if a panel is empty.

    apt-get install prometheus
    python -m benchmarks.dashboards build/sections-standard build/debian-lm --seconds 120

Knows nothing of Grafana: what a panel would draw is what its queries give.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, machine_lines
from benchmarks.processes import REPLICA, Server, ServerSpec
from deployments.fastpath import free_port
from fettle.bench.texts import read_texts
from fettle.config import FamilyConfig, KeyConfig, MonitorConfig, ServeConfig
from fettle.family import Family
from fettle.manifest import TaskKind

DEPLOY = Path("deploy")
TEXTS = Path("examples/data/debian-sections.test.jsonl.gz")
LOG = Path("build/benchmark-logs/dashboards.log")
DISCOVERY = "prom_metrics_service_discovery.json"
SERVE = "serve"
STEADY, LIMITED = "a key of the benchmark", "a key with a limit"
# Ray tells its agent every 10 s and Prometheus asks as often: so long until the last second is seen.
SETTLE_S = 25.0
CLASSES = (None, "exact", 0.01, 0.05)


@dataclass
class Load:
    """Clients of all kinds, until the time is over. `replies` counts statuses."""

    url: str
    families: Sequence[Family]
    texts: Sequence[str]
    seconds: float
    clients: int
    replies: Counter[str] = field(default_factory=Counter)

    async def run(self, server: Server) -> None:
        headers = {"authorization": f"Bearer {STEADY}"}
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(self.url, headers=headers, timeout=timeout) as http:
            end = time.monotonic() + self.seconds
            tasks = [asyncio.create_task(self._client(http, number, end)) for number in range(self.clients)]
            await asyncio.sleep(self.seconds / 2)
            self._kill_a_replica(server)
            await asyncio.gather(*tasks)

    def _kill_a_replica(self, server: Server) -> None:
        family = self.families[0]
        [victim, *_] = server.processes(f"{REPLICA}{family.name}.{family.manifest.reference}")
        victim.kill()

    async def _client(self, http: aiohttp.ClientSession, number: int, end: float) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            family = self.families[number % len(self.families)]
            try:
                await self._one(http, family, chance)
            except (aiohttp.ClientError, TimeoutError) as error:
                self.replies[type(error).__name__] += 1
            await asyncio.sleep(chance.uniform(0, 0.1))

    async def _one(self, http: aiohttp.ClientSession, family: Family, chance: random.Random) -> None:
        generates = family.manifest.task.kind is TaskKind.GENERATE
        body: dict[str, Any] = {"model": family.name}
        headers: dict[str, str] = {}
        kind = chance.random()
        if kind < 0.4:
            body["model"] += f":{chance.choice([name for name, each in family.variants.items() if each.measured])}"
        elif (wanted := chance.choice(CLASSES)) is not None:
            body["max_disagreement"] = wanted
        if kind > 0.95:
            headers["x-request-timeout-seconds"] = "0.002"
        elif kind > 0.9:
            headers["authorization"] = f"Bearer {LIMITED}"
        elif kind > 0.88:
            body["model"] = "nobody"
        text = chance.choice(self.texts)
        if generates:
            body |= {"prompt": text, "max_tokens": chance.choice([4, 16]), "temperature": 0}
            body["stream"] = kind < 0.2 or chance.random() < 0.3
        else:
            body["input"] = [text] * (200 if kind > 0.99 else 1)
        path = "/v1/completions" if generates else _path(family)
        async with http.post(path, json=body, headers=headers) as response:
            await response.read()
            self.replies[str(response.status)] += 1


def _path(family: Family) -> str:
    return "/classify" if family.manifest.task.kind is TaskKind.CLASSIFY else "/v1/embeddings"


class Prometheus:
    """One that runs, asked over its HTTP API."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series of an instant query, without those that are no number."""
        body = self._get("/api/v1/query", {"query": query})
        found = body["result"] if body["resultType"] == "vector" else [{"metric": {}, "value": body["result"]}]
        return [series for series in found if math.isfinite(float(series["value"][1]))]

    def label_values(self, definition: str) -> list[str]:
        """Grafana's `label_values(SERIES, LABEL)`."""
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", definition)
        if match is None:
            raise ValueError(f"{definition!r} is no label_values(SERIES, LABEL)")
        return sorted({series["metric"][match[2]] for series in self.ask(match[1])})

    def raised(self) -> dict[str, str]:
        """By alert: inactive, pending or firing."""
        groups = self._get("/api/v1/rules", {})["groups"]
        for rule in (rule for group in groups for rule in group["rules"]):
            if rule["health"] != "ok":
                raise ValueError(f"{rule['name']}: {rule.get('lastError')}")
        return {rule["name"]: rule["state"] for group in groups for rule in group["rules"]}

    def _get(self, path: str, parameters: dict[str, str]) -> Any:
        body = self._http.get(path, params=parameters).json()
        if body["status"] != "success":
            raise ValueError(f"{parameters}: {body['error']}")
        return body["data"]


@dataclass(frozen=True, slots=True)
class Panel:
    """What one panel shows of one variant, or of all; `series` of each query, with the first value."""

    board: str
    title: str
    subject: str
    series: Sequence[int]
    value: float | None

    @property
    def empty(self) -> bool:
        return not all(self.series)


def panels(board: dict[str, Any], prometheus: Prometheus) -> Iterator[Panel]:
    for values in settings(board, prometheus):
        for panel in board["panels"]:
            if panel["type"] == "row":
                continue
            found = [prometheus.ask(filled(target["expr"], values)) for target in panel["targets"]]
            first = next((float(series[0]["value"][1]) for series in found if series), None)
            subject = ":".join(values.values()) if "variant" in values else "all"
            yield Panel(board["title"], panel["title"], subject, [len(series) for series in found], first)


def settings(board: dict[str, Any], prometheus: Prometheus) -> list[dict[str, str]]:
    """Every choice of the board's variables that a user has; "all" where there is one."""
    choices: list[dict[str, str]] = [{}]
    for variable in board["templating"]["list"]:
        if variable["type"] != "query":
            continue
        choices = [
            {**before, variable["name"]: value}
            for before in choices
            for value in (
                [".*"] if variable["includeAll"] else prometheus.label_values(filled(variable["definition"], before))
            )
        ]
    return choices


def filled(query: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        query = query.replace(f"${name}", value)
    return query


@contextmanager
def prometheus_of(discovery: Path, where: Path) -> Iterator[Prometheus]:
    """Debian's Prometheus with the configuration that is shipped, but for the place of Ray's file."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(discovery)]}]
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", where)
    (where / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={where / 'prometheus.yml'}", f"--storage.tsdb.path={where / 'data'}"]
    with (where / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(20)


def server_spec(config: ServeConfig, port: int, temporary: Path) -> ServerSpec:
    family = Family.open(config.families[0].path)
    body = {"model": family.name, "input": "x", "prompt": "x", "max_tokens": 1}
    generates = family.manifest.task.kind is TaskKind.GENERATE
    del body["input" if generates else "prompt"]
    path = "/v1/completions" if generates else _path(family)
    if not generates:
        del body["max_tokens"]
    command = [sys.executable, "-m", "benchmarks.dashboards", SERVE, config.model_dump_json(), str(port)]
    # A temporary directory of its own, so that Ray's discovery file is this service's.
    return ServerSpec(
        command,
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"RAY_TMPDIR": str(temporary)},
        headers={"authorization": f"Bearer {STEADY}"},
    )


def serve(config: str, port: int) -> None:
    """The service, in a process of its own."""
    from deployments.server import ServerOptions, running, wait_for_signal

    with running(ServeConfig.model_validate_json(config), ServerOptions(port=port)):
        wait_for_signal()


def main() -> None:
    if sys.argv[1:2] == [SERVE]:
        serve(sys.argv[2], int(sys.argv[3]))
        return
    options = parse(sys.argv[1:])
    if shutil.which("prometheus") is None:
        sys.exit("prometheus is not installed; on Debian: apt-get install prometheus")
    machine = describe_machine()
    print("\n".join(machine_lines(machine)))
    families = [Family.open(path) for path in options.families]
    with tempfile.TemporaryDirectory(prefix="fd-") as scratch:
        where = Path(scratch)
        config = ServeConfig(
            families=[
                FamilyConfig(path=str(path.resolve()), variants=_all(Family.open(path))) for path in options.families
            ],
            monitor=MonitorConfig(share=0.2, directory=str(where / "quality")),
            api_keys=[
                KeyConfig(key=STEADY, name="steady"),
                KeyConfig(key=LIMITED, name="limited", max_concurrent=1, tokens_per_second=20),
            ],
        )
        port = free_port()
        with (
            Server(server_spec(config, port, where), LOG) as server,
            prometheus_of(where / "ray" / DISCOVERY, where) as prometheus,
        ):
            load = Load(f"http://127.0.0.1:{port}", families, read_texts(TEXTS)[:500], options.seconds, options.clients)
            asyncio.run(load.run(server))
            time.sleep(SETTLE_S)
            boards = [json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana").glob("*.json"))]
            shown = [panel for board in boards for panel in panels(board, prometheus)]
            raised = prometheus.raised()
    Console(width=140).print(table(shown))
    print("alerts:", ", ".join(f"{name} {state}" for name, state in raised.items()))
    print("replies:", dict(load.replies))
    empty = [f"{panel.board}, {panel.title}, {panel.subject}" for panel in shown if panel.empty]
    for line in empty:
        print(f"EMPTY: {line}")
    head = {"benchmark": "dashboards", "hardware": machine, "seconds": options.seconds}
    found = {"panels": len(shown), "queries": sum(len(panel.series) for panel in shown), "empty": empty}
    print(json.dumps(head | found | {"alerts": raised, "replies": dict(load.replies)}))
    sys.exit(1 if empty else 0)


def _all(family: Family) -> list[str]:
    return [name for name, variant in family.variants.items() if variant.measured is not None]


def table(shown: Sequence[Panel]) -> Table:
    found = Table("dashboard", "panel", "of", "series", "a value")
    for panel in shown:
        value = "EMPTY" if panel.empty else f"{panel.value:.4g}"
        found.add_row(panel.board, panel.title, panel.subject, " + ".join(map(str, panel.series)), value)
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboards", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=12)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
