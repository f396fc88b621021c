"""The commands about load: `fettle bench` puts one on a server, `fettle plan` says what it takes to bear one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fettle.console import INTERRUPTED, print_json
from fettle.errors import FettleError, UsageError
from fettle.family_commands import FamilyArgument, JsonOption

if TYPE_CHECKING:
    from fettle.bench.load import LoadPlan
    from fettle.family import Family

commands = typer.Typer()


class Arrival(StrEnum):
    POISSON = "poisson"
    CONSTANT = "constant"


@commands.command()
def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="With its path, which says what to send.")],
    model: Annotated[str | None, typer.Option(help="By default the first that the server names.")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests a second, whatever comes back.")] = None,
    connections: Annotated[int, typer.Option(min=1, help="Closed loop: clients that each wait for an answer.")] = 8,
    arrivals: Annotated[Arrival, typer.Option(help="Of an open loop.")] = Arrival.POISSON,
    trace: Annotated[
        Path | None, typer.Option(help="Open loop: JSONL, each line with `at` (seconds) and, if wanted, a text.")
    ] = None,
    speed: Annotated[float, typer.Option(help="How many times as fast a trace is replayed.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="That are measured.")] = 10.0,
    warm_up: Annotated[float, typer.Option(help="Seconds of load before them.")] = 2.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Closed loop: so many, instead of seconds.")] = None,
    texts: Annotated[Path | None, typer.Option(help="JSONL with a `text`, or a text a line; may be gzipped.")] = None,
    words: Annotated[str, typer.Option(help="Without --texts: words of a made text, such as 40 or 5:200.")] = "40",
    max_tokens: Annotated[str, typer.Option(help="Of a generated text, such as 64 or 16:128.")] = "64",
    body: Annotated[str | None, typer.Option(help="A JSON object that is added to every request.")] = None,
    mix: Annotated[str | None, typer.Option(help="Quality classes by share: exact=0.2,0.01=0.8.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="`Name: value`; may be repeated.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Not by path: openai, classify, classify-list, tei, chat ...")
    ] = None,
    goodput: Annotated[
        str | None, typer.Option(help="What a good answer keeps: latency=100, or ttft=500,tpot=50 (ms).")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Of the client; by default one for each two cores, 8 at most.")
    ] = None,
    drain: Annotated[float, typer.Option(help="Open loop: seconds after the window for late answers.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Order of texts, arrivals, lengths and classes.")] = 0,
    samples: Annotated[Path | None, typer.Option(help="Write every request to this file (.npz).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a drawing (.svg or .html).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure a server under load: rates, latencies, of generated text its times to each token.

    Any server with OpenAI's, TEI's or vLLM's shapes. In an open loop latency counts from when a request was due.

    Example: `fettle bench http://localhost:8000/classify --rate 200 --mix exact=0.2,0.01=0.8 --goodput latency=100`
    """
    from rich.console import Console

    from fettle.bench import figures, show, target
    from fettle.bench import plot as drawing
    from fettle.bench.crew import Tick, enough_processes, measure
    from fettle.bench.load import TEXTS, LoadPlan
    from fettle.bench.texts import read_trace
    from fettle.bench.traffic import GENERATES, KINDS, Flow, kind_of, mix_of

    target.check_address(url)
    kind = next((known for known in KINDS if known == shape), None) if shape else kind_of(url)
    if kind is None:
        raise UsageError(f"--shape {shape!r}: there are {', '.join(KINDS)}")
    if rate is not None and not rate > 0:
        raise UsageError(f"--rate {rate:g} must be above 0")
    if trace is not None and rate is not None:
        raise UsageError("give --rate or --trace: a trace has its own times (--speed makes it faster)")
    objectives = figures.Objectives.of(goodput)
    if trace is not None:
        rows = read_trace(trace, speed)
        seconds, warm_up = rows[-1].at + 1e-3, 0.0
    own = tuple(header or ())
    plan = LoadPlan(
        url=url,
        model=model or target.model_of(url, own),
        texts=texts or TEXTS,
        synthetic=None if texts else _bounds(words, "--words"),
        kind=kind,
        flows=mix_of(mix) if mix else (Flow(),),
        connections=connections,
        rate=rate,
        arrivals=arrivals.value,
        trace=trace,
        speed=speed,
        seconds=seconds,
        warm_up=warm_up,
        drain=drain,
        seed=seed,
        headers=own,
        requests=requests,
        keep=figures.KEPT,
        samples=samples,
        max_tokens=_bounds(max_tokens, "--max-tokens") if kind in GENERATES else None,
        body=_object(body),
    )
    target.check_answers(url, kind, plan.model, own)
    errors = Console(stderr=True)

    def tell(tick: Tick) -> None:
        line = show.progress(tick, plan.warm_up + plan.seconds)
        errors.print(line, end="\r" if errors.is_terminal else "\n", highlight=False, soft_wrap=True)

    measured = measure(plan, processes or enough_processes(), on_tick=tell)
    found = figures.figures(measured, objectives)
    if plot is not None:
        drawing.write(found, f"{url}, {_load(plan)}", plot)
    if as_json:
        print_json({"url": url, "load": _load(plan), "seed": seed, **found})
    else:
        show.print_report(found, Console())
    if measured.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not found["statuses"].get("200"):
        raise FettleError("not one request was answered with 200")


@commands.command()
def plan(
    directory: FamilyArgument,
    rate: Annotated[float, typer.Option(help="Requests a second, of one text each.")],
    latency: Annotated[float, typer.Option(help="Milliseconds that a request may take, at --percentile.")],
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Classes by share: exact=0.2,0.01=0.8; may be repeated.  [default: 0.01]", show_default=False
        ),
    ] = None,
    percentile: Annotated[float, typer.Option(min=50, max=99.99, help="Of each class.")] = 99.0,
    texts: Annotated[Path | None, typer.Option(help="A sample; by default all texts have the usual length.")] = None,
    cores_per_node: Annotated[int, typer.Option(min=1, help="That Ray may use.")] = 8,
    gpus_per_node: Annotated[int, typer.Option(min=0)] = 0,
    price_per_node_hour: Annotated[float | None, typer.Option(min=0, help="In any currency.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of one replica; as the family was measured.")] = 1,
    pace: Annotated[
        float, typer.Option(help="How many times as long as where it was measured everything takes on the nodes.")
    ] = 1.0,
    requests: Annotated[int, typer.Option(min=100, help="That each simulation is about.")] = 8000,
    seed: Annotated[int, typer.Option(help="Of arrivals, and of where rows leave.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what it takes to bear a load: points, replicas, nodes, latency, cost, and what the original alone would take.

    The router's own policy runs on simulated replicas that take as long as the family's measured tables say.

    Example: `fettle plan ./family --rate 5000 --latency 100 --mix exact=0.1,0.01=0.9 --price-per-node-hour 0.4`
    """
    from rich.console import Console

    from fettle.family import Family
    from fettle.plan.cell import ServingCosts
    from fettle.plan.show import print_plan
    from fettle.plan.sizing import Node, Objective
    from fettle.plan.study import Wanted, study

    for name, value in (("--rate", rate), ("--latency", latency), ("--pace", pace)):
        if not 0 < value < float("inf"):
            raise UsageError(f"{name} {value:g} must be above 0")
    family = Family.open(directory)
    wanted = Wanted(
        rate=rate,
        objective=Objective(latency, percentile),
        node=Node(cores_per_node, gpus_per_node, price_per_node_hour),
        lengths=_lengths(family, texts),
        threads=threads,
        pace=pace,
        seed=seed,
        requests=requests,
        costs=ServingCosts().at_pace(pace),
    )
    found = study(family, mix or ["0.01"], wanted)
    if as_json:
        print_json(found)
    else:
        print_plan(found, Console())


def _lengths(family: Family, texts: Path | None) -> list[int]:
    """Tokens of rows: of these texts, or the usual number for all."""
    if texts is None:
        measured = [variant.measured for variant in family.variants.values() if variant.measured is not None]
        return [measured[0].typical_length] if measured else [1]
    from fettle.bench.texts import read_texts
    from fettle.tokenizer import Tokenizer

    return [len(row) for row in Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode(read_texts(texts))]


def _bounds(text: str, option: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        bounds = (0, 0)
    if not 0 < bounds[0] <= bounds[1]:
        raise UsageError(f"{option} {text!r} must be a number above 0, or two such as 16:128")
    return bounds


def _object(text: str | None) -> dict[str, Any]:
    import orjson

    try:
        found = {} if text is None else orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"--body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError("--body must be a JSON object")
    return found


def _load(plan: LoadPlan) -> str:
    """In words."""
    if plan.trace is not None:
        return f"trace {plan.trace.name} at {plan.speed:g} times its speed"
    if plan.rate is not None:
        return f"open loop, {plan.rate:g} requests/s, {plan.arrivals}"
    return f"closed loop, {plan.connections} connections"
