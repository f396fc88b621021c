"""The monitor at work: no alarm without a cause, an alarm in time with one, and what it does to the traffic.

Three parts, each at a service of its own with two routers and a larger share of shadow samples than usual:

- `quiet`: the texts that the family was tested on, at full speed; no alarm may come.
- `drift`: texts of another kind, the same words thrown together at random, at a rate that the reference can bear.
- `corrupt`: a family of fake engines whose cheap variant gives a wrong answer to every twentieth row.

For the last two: how many shadow samples the alarm took against what theory says for the disagreement seen, how long it
took until no router used the point any more, and whether the traffic went on. The exit status is 1 for a false alarm,
none at all, one that took more than twice what theory says, or traffic that stopped.

    python -m benchmarks.drift build/sections-standard --parts quiet,drift,corrupt
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import service
from benchmarks.alarms import Stops, corrupted_family, stopping
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.processes import Server
from deployments.fastpath import free_port
from fettle.bench.crew import run_apart, sampled
from fettle.bench.load import TEXTS, LoadPlan
from fettle.bench.samples import Samples
from fettle.bench.texts import read_texts
from fettle.bench.traffic import Flow
from fettle.evidence import expected_samples
from fettle.family import Family

LOGS = Path("build/benchmark-logs")
PARTS = ("quiet", "drift", "corrupt")
KEPT = tuple(f"x-fettle-{name}" for name in ("router", "point", "bound", "variant"))
ROUTERS = 2
WITHIN = 2.0  # times the shadow samples that theory says
GOES_ON = 0.99  # of the requests after the alarm have to be answered
SEEN_WITHIN_S = 5.0
POLL_S = 0.2


@dataclass(slots=True)
class Watch:
    """Asks `GET /quality` again and again in a thread; `states` are the last, `alarms` as each was first seen."""

    url: str
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    alarms: dict[str, dict[str, Any]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.ask()

    def ask(self) -> None:
        parts = urlsplit(self.url)
        try:
            with urllib.request.urlopen(f"{parts.scheme}://{parts.netloc}/quality", timeout=10) as reply:
                found = json.load(reply)
        except (urllib.error.URLError, TimeoutError):
            return  # busy: the next time will do
        for family in found["families"]:
            for state in family["points"]:
                self.states[state["point"]] = state
                if state["status"] == "revoked":
                    self.alarms.setdefault(state["point"], state | {"seen_at": time.time()})

    def settle(self, within_s: float) -> None:
        """Wait until no more shadow samples come in."""
        deadline, counts, since = time.monotonic() + within_s, -1, time.monotonic()
        while time.monotonic() < deadline and time.monotonic() - since < 6.0:
            time.sleep(1.0)
            now = sum(state["shadows"] for state in self.states.values())
            if now != counts:
                counts, since = now, time.monotonic()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self.ask()


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    parts: dict[str, Callable[[argparse.Namespace, int], dict[str, Any]]] = {
        "quiet": quiet,
        "drift": drift,
        "corrupt": corrupt,
    }
    reports = {}
    for name in options.parts:
        say(name)
        reports[name] = parts[name](options, machine["cores"])
    broken = [f"{name}: {line}" for name, report in reports.items() for line in report["broken_promises"]]
    if not options.json:
        for name, report in reports.items():
            Console(width=140).print(table(name, report))
        for line in broken:
            print(f"BROKEN: {line}")
    names = ("share", "requests", "drift_seconds", "levels", "seed")
    settings = {name: getattr(options, name) for name in names} | {"family": options.family.name}
    head = {"benchmark": "drift", "hardware": machine, "settings": settings}
    print(json.dumps(head | {"parts": reports, "broken_promises": broken}))
    sys.exit(1 if broken else 0)


def quiet(options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """Many requests of the texts that the points were tested on."""
    family = Family.open(options.family)
    with tempfile.TemporaryDirectory() as scratch:
        spec = service.spec(
            _config(options, options.family, cores, Path(scratch)), free_port(), "/classify", family.name
        )
        flows = tuple(Flow(f"{100 * level:g} %", max_disagreement=level) for level in options.levels)
        plan = LoadPlan(spec.url, family.name, texts=options.texts, kind="classify", flows=flows, seed=options.seed)
        with Server(spec, LOGS / "drift-quiet.log"), Watch(spec.url) as watch:
            report = run_apart(replace(plan, connections=64, requests=options.requests))
            watch.settle(options.settle)
    broken = [f"false alarm at {point} after {state['shadows']} samples" for point, state in watch.alarms.items()]
    broken += [f"{count} x status {status}" for status, count in report["statuses"].items() if status != "200"]
    shadows = sum(state["shadows"] for state in watch.states.values())
    if not shadows:
        broken.append("no shadow sample came in")
    on_test = {point.id: point.test.disagreement if point.test else None for point in family.manifest.points}
    return {
        "requests": report["requests"],
        "rps": report["rps"],
        "shadows": shadows,
        "shadows_expected": round(options.share * report["requests"]),
        "states": watch.states,
        "disagreement_on_test": on_test,
        "broken_promises": broken,
    }


def drift(options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """Texts of another kind, at half of what the reference can bear, since it may have to answer all of them."""
    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch, "shuffled-words.jsonl")
        write_texts(texts, shuffled_words(read_texts(options.texts), options.seed))
        name = Family.open(options.family).name
        config = _config(options, options.family, cores, Path(scratch))
        spec = service.spec(config, free_port(), "/classify", name)
        with Server(spec, LOGS / "drift-drift.log"):
            exact = (Flow(max_disagreement="exact"),)
            plan = LoadPlan(
                spec.url, name, texts=texts, kind="classify", flows=exact, connections=32, seed=options.seed
            )
            rate = 0.5 * float(run_apart(replace(plan, seconds=8.0, warm_up=4.0))["rps"])
            return _alarmed(options, plan, rate, Path(scratch))


def corrupt(options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """Every twentieth answer of the cheap variant is wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        family, words = corrupted_family(Path(scratch, "family"), every=20)
        source = random.Random(options.seed)
        texts = Path(scratch, "words.jsonl")
        write_texts(texts, [" ".join(source.choices(words, k=12)) for _ in range(2000)])
        config = _config(options, family.directory, cores, Path(scratch))
        spec = service.spec(config, free_port(), "/classify", family.name)
        with Server(spec, LOGS / "drift-corrupt.log"):
            plan = LoadPlan(spec.url, family.name, texts=texts, kind="classify", seed=options.seed)
            return _alarmed(options, plan, options.corrupt_rate, Path(scratch))


def _alarmed(options: argparse.Namespace, plan: LoadPlan, rate: float, scratch: Path) -> dict[str, Any]:
    """Send at a fixed rate in the first class until well after the alarm; what came of it."""
    flows = (Flow("all", max_disagreement=options.levels[0]),)
    said = {"warm_up": 0.0, "seconds": options.drift_seconds, "samples": scratch / "samples.npz", "keep": KEPT}
    with Watch(plan.url) as watch:
        say(f"{rate:.0f} requests/s")
        _, samples = sampled(replace(plan, flows=flows, rate=rate, **said))
        watch.settle(options.settle)
    points = {}
    broken = []
    for name, state in watch.alarms.items():
        stops = stopping(scratch, name, state["alpha"], options.delta)
        points[name] = _figures(state, stops, samples, options.delta)
        if stops.mean > WITHIN * points[name]["samples_expected"]:
            broken.append(
                f"{name}: the alarm takes {stops.mean:.0f} samples on average, theory says "
                f"{points[name]['samples_expected']:.0f} at {stops.disagreement:.2%}"
            )
        seen = points[name]["seen_everywhere_after_s"]
        if seen > SEEN_WITHIN_S:
            broken.append(f"{name}: a router still used the point {seen:.1f} s after its revocation")
    if not watch.alarms:
        broken.append("no alarm came")
    else:
        last = max(state["seen_at"] for state in watch.alarms.values()) - samples.epoch
        after = samples.where(samples.due > last)
        if not len(after) or after.good.mean() < GOES_ON:
            broken.append(
                f"after the last alarm {after.good.mean() if len(after) else 0:.1%} of the requests were good"
            )
    routers = sorted(set(samples.headers["x-fettle-router"][samples.good]))
    if len(routers) < ROUTERS:
        broken.append(f"{len(routers)} of {ROUTERS} routers answered")
    statuses = {
        str(status): int(count) for status, count in zip(*np.unique(samples.status, return_counts=True), strict=True)
    }
    return {
        "rate": rate,
        "statuses": statuses,
        "routers": len(routers),
        "points": points,
        "states": watch.states,
        "broken_promises": broken,
    }


def _figures(state: dict[str, Any], stops: Stops, samples: Samples, delta: float) -> dict[str, Any]:
    """Of one alarm: samples and seconds."""
    revoked = state["revoked_at"] - samples.epoch
    used = samples.good & (samples.headers["x-fettle-point"] == state["point"])
    last = {}
    for router in sorted(set(samples.headers["x-fettle-router"][used])):
        mine = used & (samples.headers["x-fettle-router"] == router)
        last[router] = float(samples.due[mine].max()) - revoked
    return {
        "alpha": state["alpha"],
        "disagreement": stops.disagreement,
        "samples_first": stops.counts[0] if stops.counts else None,
        "samples_mean": stops.mean,
        "alarms_replayed": len(stops.counts),
        "samples_expected": expected_samples(stops.disagreement, state["alpha"], delta),
        "samples_when_latched": state["shadows"],
        "alarm_after_s": revoked,
        "shown_after_s": state["seen_at"] - state["revoked_at"],
        "seen_everywhere_after_s": max([0.0, *last.values()]),
    }


def shuffled_words(texts: Sequence[str], seed: int) -> list[str]:
    """All words in random order, cut into texts of the lengths that there were."""
    words = [word for text in texts for word in text.split()]
    random.Random(seed).shuffle(words)
    made, at = [], 0
    for text in texts:
        count = len(text.split())
        made.append(" ".join(words[at : at + count]))
        at += count
    return [text for text in made if text]


def write_texts(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def _config(options: argparse.Namespace, family: Path, cores: int, scratch: Path) -> Any:
    made = service.config(family, cores, scratch / "quality", share=options.share, routers=ROUTERS)
    return made.model_copy(update={"monitor": made.monitor.model_copy(update={"delta": options.delta})})


def table(name: str, report: dict[str, Any]) -> Table:
    made = Table(name)
    for column in ("alpha", "shadows", "disagreements", "evidence", "status"):
        made.add_column(column, justify="right")
    for point, state in report["states"].items():
        cells = (f"{state['alpha']:.2%}", state["shadows"], state["disagreements"], f"{state['evidence']:.3g}")
        made.add_row(point, *map(str, cells), state["status"])
    lines = [
        f"{point}: at {row['disagreement']:.2%} the alarm takes {row['samples_mean']:.0f} samples (theory "
        f"{row['samples_expected']:.0f}), came after {row['alarm_after_s']:.1f} s, no router used the point "
        f"{row['seen_everywhere_after_s']:.1f} s later"
        for point, row in report.get("points", {}).items()
    ]
    if "shadows_expected" in report:
        lines.append(f"{report['requests']} requests, {report['rps']:.0f}/s; {report['shadows_expected']} samples due")
    made.caption = "\n".join(lines)
    return made


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--parts", type=parts_of, default=",".join(PARTS))
    parser.add_argument("--share", type=float, default=0.2, help="of the requests that are also answered in the shadow")
    parser.add_argument("--delta", type=float, default=0.01, help="of the alarm")
    parser.add_argument("--levels", type=levels, default="0.01,0.02,0.05", help="classes; `drift` uses the first")
    parser.add_argument("--requests", type=int, default=50_000, help="of the quiet part")
    parser.add_argument("--drift-seconds", type=float, default=60.0, help="of drifted traffic")
    parser.add_argument("--corrupt-rate", type=float, default=100.0, help="requests a second of the corrupt part")
    parser.add_argument("--settle", type=float, default=180.0, help="most seconds to wait for shadow samples")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


def levels(text: str) -> list[float]:
    return [float(level) for level in text.split(",") if level]


def parts_of(text: str) -> list[str]:
    found = [part for part in text.split(",") if part]
    unknown = sorted(set(found) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return found


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
