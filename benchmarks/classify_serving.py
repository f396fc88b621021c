"""The classification half of `benchmarks.encoder_serving`: peers, int8 alone, int8 with escalation, quality classes.

One server after the other, the same texts in the same order. Each is measured under load and then answers texts one a
request whose labels are compared with the reference's. Beside the measured rates stands what the measured costs
predict: the processor time of a row, from the bare engines in the same run, and of the serving path, from the int8
variant's own figures.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import service
from benchmarks.answers import Agreement, above_bound, compare, outside_class, reference_labels
from benchmarks.cascade import INT8, escalation_family
from benchmarks.comparison import WARN_OTHERS, Figures, best_peers
from benchmarks.meter import Meter
from benchmarks.processes import Server, ServerSpec
from benchmarks.systems import peer_system
from deployments.fastpath import free_port
from fettle.bench.crew import sampled
from fettle.bench.load import LoadPlan
from fettle.bench.texts import read_texts
from fettle.bench.traffic import Flow, Kind
from fettle.config import ServeConfig
from fettle.family import Family
from fettle.manifest import Step
from fettle.points import choose_point, whole
from fettle.tokenizer import Tokenizer
from optimize.measure import try_points

LOGS = Path("build/benchmark-logs")
MADE = Path("build/benchmark-families")
CASCADE = "int8 with escalation"
KEPT = ("x-fettle-point", "x-fettle-bound", "x-fettle-variant", "x-fettle-degraded", "x-fettle-gear")
PEER_ROWS = 256
WRONG_PEER = 0.2  # a peer that changes more than this serves another model
NEAR = 0.9  # of what the measured costs predict
TWICE, FIVEFOLD = 2.0, 5.0


@dataclass(frozen=True, slots=True)
class Ask:
    """What is measured at one server: a model's name there, and what is asked of it.

    `point` is a way through the family whose cost predicts the rate; `promise` the largest share of changed answers.
    """

    name: str
    model: str
    flow: Flow
    kind: Kind = "classify"
    is_peer: bool = False
    point: str | None = None
    promise: float | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """One run: its settings, the family and what the reference answers, and what was found, which fills up."""

    options: argparse.Namespace
    family: Family
    cores: int
    labels: Sequence[str]
    say: Callable[[str], None]
    rows: list[Figures]
    answers: dict[str, Agreement]
    points: dict[str, dict[str, int]]
    broken: list[str]
    failed: dict[str, str]

    def serve(self, spec: ServerSpec, asks: Sequence[Ask]) -> None:
        """One server from start to stop: every ask at every number of connections, then its answers checked."""
        log = LOGS / f"classify-{asks[0].name.replace(' ', '-').replace('%', '')}.log"
        with Server(spec, log) as server, tempfile.TemporaryDirectory() as scratch:
            for ask in asks:
                self.say(f"measure {ask.name}")
                plan = self._plan(spec.url, ask, Path(scratch))
                mine = [self._measure(server, ask, plan, connections) for connections in self.options.connections]
                found = self._check(ask, plan)
                for row in mine:
                    self.say(f"{row.connections} connections: {row.rps:.0f}/s, others {row.others:.1%}; {found}")
                self.answers[ask.name] = found
                self.rows.extend(replace(row, changed=found.share) for row in mine)

    def _plan(self, url: str, ask: Ask, scratch: Path) -> LoadPlan:
        given = self.options
        return LoadPlan(
            url,
            ask.model,
            texts=given.texts,
            kind=ask.kind,
            flows=(replace(ask.flow, tag=ask.name),),
            seconds=given.seconds,
            warm_up=given.warm_up,
            seed=given.seed,
            keep=() if ask.is_peer else KEPT,
            samples=scratch / "samples.npz",
        )

    def _measure(self, server: Server, ask: Ask, plan: LoadPlan, connections: int) -> Figures:
        meter = Meter(server)
        report, samples = sampled(replace(plan, connections=connections), meter.read)
        if not ask.is_peer:
            by_point: dict[str, int] = {}
            for point in samples.headers["x-fettle-point"][samples.good]:
                by_point[point] = by_point.get(point, 0) + 1
            self.points[f"{ask.name}, {connections}"] = by_point
            self.broken.extend(self._outside(samples, ask, plan))
        return Figures.of(ask.name, connections, report, meter.window(self.cores), is_peer=ask.is_peer)

    def _check(self, ask: Ask, plan: LoadPlan) -> Agreement:
        """All of the texts, or for a peer some of them, one a request; the labels against the reference's."""
        first = PEER_ROWS if ask.is_peer else None
        _, samples = sampled(replace(plan, connections=32, once=True, first=first, labels=True))
        found = compare(samples, self.labels, plan.seed)
        lost = int((~samples.good).sum())
        if lost:
            self.broken.append(f"{ask.name}: {lost} of {len(samples)} requests were not answered")
        if ask.is_peer and found[ask.name].share > WRONG_PEER:
            self.failed[ask.name] = f"changes {found[ask.name].share:.0%} of the answers: another model?"
        if ask.promise is not None:
            self.broken.extend(above_bound(found, {ask.name: ask.promise}))
            self.broken.extend(self._outside(samples, ask, plan))
        return found[ask.name]

    def _outside(self, samples: Any, ask: Ask, plan: LoadPlan) -> list[str]:
        return outside_class(samples, plan.flows, self.family.manifest.reference) if ask.promise is not None else []


def run(options: argparse.Namespace, cores: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything; the report has `results`, `predicted`, `answers`, `broken` and `failed`."""
    family = Family.open(options.family)
    say("answers of the reference")
    labels = reference_labels(options.family, options.texts, cores)
    escalation = escalation_family(options.family, MADE, say, threads=cores)
    copied = Family.open(escalation)
    say("costs of the bare engines")
    costs = _costs(family, copied, _ways(family, copied), read_texts(options.texts)[: options.offline_rows])
    contest = Contest(options, family, cores, labels, say, [], {}, {}, [], {})
    for name in options.peers:
        _attempt(contest, name, partial(_serve_peer, contest, name))
    with tempfile.TemporaryDirectory() as scratch:
        config = partial(_config, cores=cores, quality=Path(scratch))
        pinned = Ask(f"fettle {INT8}, pinned", f"{family.name}:{INT8}", Flow(), point=INT8)
        _serve_ours(contest, config(options.family, variants=[INT8], default=INT8), [pinned])
        level = copied.manifest.points[0].certificate.alpha
        flow = Flow(max_disagreement=level)
        ask = Ask(f"fettle {CASCADE}", copied.name, flow, point=CASCADE, promise=level)
        _serve_ours(contest, config(escalation), [ask])
        _serve_ours(contest, config(options.family), [_class(family, level) for level in options.classes])
    return _report(contest, costs, copied.manifest.points[0].steps)


def _serve_peer(contest: Contest, name: str) -> None:
    contest.say(f"prepare {name}")
    system = peer_system(name, contest.options.model, contest.options.peer_env, "classify")
    kind: Kind = "classify" if name == "plain" else "classify-list"
    contest.serve(system.server(free_port()), [Ask(name, system.model, Flow(), kind=kind, is_peer=True)])


def _serve_ours(contest: Contest, config: ServeConfig, asks: Sequence[Ask]) -> None:
    spec = service.spec(config, free_port(), "/classify", asks[0].model)
    _attempt(contest, asks[0].name, lambda: contest.serve(spec, asks))


def _attempt(contest: Contest, name: str, work: Callable[[], None]) -> None:
    try:
        work()
    except (RuntimeError, ValueError, OSError) as error:
        contest.say(f"{name} failed: {error}")
        contest.failed[name] = (str(error) or repr(error)).splitlines()[0]


def _config(family: Path, *, cores: int, quality: Path, **more: Any) -> ServeConfig:
    made = service.config(family, cores, quality)
    return made.model_copy(update={"families": [made.families[0].model_copy(update=more)]})


def _class(family: Family, level: float | str) -> Ask:
    flow = Flow(max_disagreement=level)
    if isinstance(level, str):
        return Ask("fettle exact", family.name, flow, point="exact", promise=0.0)
    point = choose_point(family.manifest.points, level)
    found = "exact" if point is None else point.id
    return Ask(f"fettle {100 * level:g} %", family.name, flow, point=found, promise=level)


def _ways(family: Family, copied: Family) -> dict[str, Sequence[Step]]:
    manifest = family.manifest
    ways: dict[str, Sequence[Step]] = {point.id: point.steps for point in manifest.points}
    ways |= {INT8: whole(family.variant(INT8)), "exact": whole(family.variant(manifest.reference))}
    return ways | {CASCADE: copied.manifest.points[0].steps}


def _costs(
    family: Family, copied: Family, ways: Mapping[str, Sequence[Step]], texts: Sequence[str]
) -> dict[str, float]:
    """Processor ms of a row by way, from the bare engines, one thread, rows of like length together."""
    # Contestants have names that a file may have.
    names = {f"way-{number}": name for number, name in enumerate(ways)}
    rows = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode(list(texts))
    paths = {name: copied.variant_path(name) for name in copied.variants}
    paths |= {name: family.variant_path(name) for name in family.variants}
    tried = {short: ways[name] for short, name in names.items()}
    costs = try_points(tried, paths, rows, family.manifest.task, 1, lambda _: None)[0]
    return {name: costs[short] for short, name in names.items()}


def _report(contest: Contest, costs: Mapping[str, float], steps: Sequence[Step]) -> dict[str, Any]:
    asks = {ask.name: ask for ask in _asks(contest)}
    most = max(contest.options.connections)
    saturated = {row.system: row for row in contest.rows if row.connections == most}
    int8 = saturated.get(f"fettle {INT8}, pinned")
    # What a request takes of the machine beside the engine's own work: router, transport, Ray, and the client.
    overhead = 1000 * contest.cores / int8.rps - costs[INT8] if int8 else None
    peer = best_peers(contest.rows).get(most)
    cascade = saturated.get(f"fettle {CASCADE}")
    predicted = {}
    for name, row in saturated.items():
        ask = asks.get(name)
        entry: dict[str, Any] = {"rps": row.rps, "others": row.others}
        if peer:
            entry["ratio_to_best_peer"] = row.rps / peer
        if cascade:
            entry["ratio_to_escalation"] = row.rps / cascade.rps
        if ask and ask.point is not None and ask.point in costs:
            cost = costs[ask.point]
            entry |= {"cost_ms": cost, "manifest_ms": _manifest_ms(contest.family, ask.point)}
            if overhead is not None:
                entry["predicted_rps"] = 1000 * contest.cores / (cost + overhead)
                entry["of_predicted"] = row.rps / entry["predicted_rps"]
        predicted[name] = entry
    if cascade and overhead is not None:
        allowed = (costs[CASCADE] + overhead) / (costs[_point_at(contest.family, 0.01)] + overhead)
        contest.broken.extend(_missed(predicted, allowed))
    return {
        "results": [asdict(row) for row in contest.rows],
        "overhead_ms": overhead,
        "overhead_others": int8.others if int8 else None,
        "escalation": [step.variant for step in steps],
        "costs_ms": dict(costs),
        "saturated": predicted,
        "answers": {name: asdict(found) | {"share": found.share} for name, found in contest.answers.items()},
        "points": contest.points,
        "broken": contest.broken,
        "failed": contest.failed,
    }


def _missed(predicted: Mapping[str, Mapping[str, Any]], allowed: float) -> list[str]:
    """What the 1 % class has to reach: twice int8 with escalation, or all that its costs predict; five times fp32."""
    found = predicted.get("fettle 1 %")
    if found is None:
        return []
    broken = []
    if found["ratio_to_escalation"] < TWICE and found["of_predicted"] < NEAR:
        broken.append(
            f"the 1 % class serves {found['ratio_to_escalation']:.2f} times int8 with escalation; its costs allow "
            f"{allowed:.2f}, and it reaches {found['of_predicted']:.0%} of the rate that they predict"
        )
    for name in ("plain", "infinity-torch"):
        if name in predicted and found["rps"] < FIVEFOLD * predicted[name]["rps"]:
            broken.append(f"the 1 % class serves only {found['rps'] / predicted[name]['rps']:.1f} times {name}")
    return broken


def _asks(contest: Contest) -> list[Ask]:
    family = contest.family
    fixed = [Ask(f"fettle {INT8}, pinned", "", Flow(), point=INT8), Ask(f"fettle {CASCADE}", "", Flow(), point=CASCADE)]
    return fixed + [_class(family, level) for level in contest.options.classes]


def _point_at(family: Family, level: float) -> str:
    point = choose_point(family.manifest.points, level)
    return "exact" if point is None else point.id


def _manifest_ms(family: Family, name: str | None) -> float | None:
    points = {point.id: point.expected_cpu_ms for point in family.manifest.points}
    if name in points:
        return points[name]
    variant = family.variants.get(family.manifest.reference if name == "exact" else str(name))
    return variant.measured.row_cpu_ms if variant is not None and variant.measured is not None else None


def print_report(report: Mapping[str, Any]) -> None:
    """Rates against peers, escalation and prediction, at the most connections."""
    table = Table("at the most connections")
    for name in ("req/s", "x best peer", "x escalation", "CPU ms/row", "predicted req/s", "reached", "changed"):
        table.add_column(name, justify="right")
    for name, row in report["saturated"].items():
        changed = report["answers"].get(name)
        table.add_row(
            name,
            f"{row['rps']:.1f}",
            _shown(row.get("ratio_to_best_peer"), "{:.2f}"),
            _shown(row.get("ratio_to_escalation"), "{:.2f}"),
            _shown(row.get("cost_ms"), "{:.2f}"),
            _shown(row.get("predicted_rps"), "{:.1f}"),
            _shown(row.get("of_predicted"), "{:.0%}"),
            f"{changed['share']:.2%} of {changed['rows']}" if changed else "",
        )
    Console(width=140).print(table)
    if report["overhead_ms"] is not None:
        print(f"the serving path takes {report['overhead_ms']:.2f} ms of the machine a request, the client included")
        if report["overhead_others"] > WARN_OTHERS:
            others = report["overhead_others"]
            print(f"WARNING: others took {others:.0%} of the machine in the row that this and the predictions rest on")
    print(f"{CASCADE}: the search chose {' > '.join(report['escalation'])}")
    for line in report["broken"]:
        print(f"BROKEN: {line}")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
