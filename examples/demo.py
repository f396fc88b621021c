"""`fettle demo`: the main job from end to end on real data, in a few minutes on two cores, without the network.

Fine-tunes a classifier, optimizes it and the embedding model it came from, answers texts at every certified level
without a server, serves both families on Ray, asks every served variant real questions over HTTP, compares each answer
with the reference's and with the variant's own offline answer, and prints tables and one JSON line.
"""

from __future__ import annotations

import asyncio
import shlex
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
from rich import box
from rich.console import Console
from rich.table import Table

import fettle
from deployments.server import ServerOptions, running
from examples.finetune import Recipe, base_model, finetune, read_rows, split_path
from fettle.answers import Floats, disagreements
from fettle.config import DataFiles, FamilyConfig, OptimizeConfig, ReplicaConfig, ServeConfig
from fettle.family import Family
from fettle.manifest import TaskKind
from fettle.rows import Row, Rows, in_batches
from fettle.tokenizer import Tokenizer
from optimize.pipeline import run as optimize
from optimize.progress import Progress
from workers.engine import EngineOptions, open_engine

CLASSIFIER, EMBEDDER = "sections", "minilm"
ALONE_REQUESTS = 40
OFFLINE_ROWS, OFFLINE_TOKENS = 32, 4096
SPLITS = ("train", "validation", "calibration", "test")
EMBEDDER_RECIPES = ["torch-fp32", "onnx-fp32", "onnx-int8-dynamic", "onnx-int8"]
SHOWN = ("torch-fp32", "onnx-fp32", "onnx-int8-dynamic", "onnx-int8", "exits-frozen-int8")
MEASURED_ROWS = 600


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`questions` texts are asked of each variant, by `connections` clients at a time."""

    directory: Path
    port: int = 8000
    questions: int = 300
    connections: int = 32
    replicas: int = 2
    training_rows: int = 2500


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the table. Shares are of the questions asked, in [0, 1]."""

    family: str
    variant: str
    size_mb: float
    alone_ms: float
    requests_per_second: float
    same_as_reference: float
    same_as_offline: float
    batch_invariant: bool
    changed_by_batching: float
    metric: float | None


@dataclass(frozen=True, slots=True)
class Certified:
    """One level of the classifier's table: what answers it, and how many of the questions it answered as promised.

    `cost`: processor time of a row over that of the fp32 ONNX reference, as optimize measured it.
    """

    max_disagreement: float
    point: str | None
    upper_bound: float | None
    cost: float | None
    same_as_reference: float


def run(options: DemoOptions, console: Console) -> tuple[list[Outcome], list[Certified]]:
    """Everything, with progress on `console`; what is already there from an earlier run is not made again."""
    options.directory.mkdir(parents=True, exist_ok=True)
    classifier = options.directory / "classifier"
    if not (classifier / "config.json").exists():
        train(classifier, Recipe(rows=options.training_rows), console)
    families = {
        CLASSIFIER: make_family(CLASSIFIER, classifier, options.directory, console),
        EMBEDDER: make_family(EMBEDDER, base_model(), options.directory, console),
    }
    rows = read_rows("test")[: options.questions]
    with console.status("answers at every certified level, without a server"):
        certified = answer_at_levels(families[CLASSIFIER], rows)
    served = ServeConfig(
        families=[FamilyConfig(path=str(family.directory), variants=shown(family)) for family in families.values()],
        replicas=ReplicaConfig(min_replicas=options.replicas, max_replicas=options.replicas),
    )
    with ExitStack() as service:
        with console.status("starting Ray and the replicas"):
            url = service.enter_context(running(served, ServerOptions(port=options.port, dashboard=False)))
        outcomes = asyncio.run(question_all(url, families, rows, options, console))
    report(outcomes, families, options, console)
    report_levels(certified, families[CLASSIFIER], console)
    return outcomes, certified


def train(out: Path, recipe: Recipe, console: Console) -> None:
    """Fine-tune the reference, with a progress bar."""
    progress = Progress(console)
    name = f"fine-tune a classifier on {recipe.rows} texts"
    progress.plan({name: recipe.rows / 40})
    with progress, progress.step(name) as advance:
        finetune(out, recipe, lambda done, _: advance(done / recipe.rows))


def make_family(name: str, model: Path, directory: Path, console: Console) -> Family:
    """Optimize one model on the bundled texts; a family that is complete is only checked."""
    # The embedding model is only measured; training and certificates are shown on the classifier.
    splits = SPLITS if name == CLASSIFIER else ("test",)
    config = OptimizeConfig(
        model=str(model),
        out=directory / name,
        files=DataFiles.model_validate({split: split_path(split) for split in splits}),
        name=name,
        recipes=None if name == CLASSIFIER else EMBEDDER_RECIPES,
        max_rows=MEASURED_ROWS,
    )
    console.print(f"[bold]fettle optimize {shlex.quote(str(model))} --out {shlex.quote(str(config.out))}[/bold]")
    return optimize(config, Progress(console))


def answer_at_levels(family: Family, rows: Sequence[dict[str, str]]) -> list[Certified]:
    """The questions answered in this process, by whatever is certified for each level."""
    texts, outcomes = [row["text"] for row in rows], []
    with fettle.load(family.directory) as local:
        truth = [prediction.answer for prediction in local.predict(texts, max_disagreement="exact")]
        points = {point.id: point for point in family.manifest.points}
        for level in sorted(family.manifest.levels, key=lambda level: level.alpha):
            found = local.predict(texts, max_disagreement=level.alpha)
            point = points.get(found[0].point or "")
            test = point.test if point else None
            same = np.mean([prediction.answer == right for prediction, right in zip(found, truth, strict=True)])
            outcomes.append(
                Certified(
                    max_disagreement=level.alpha,
                    point=point.id if point else None,
                    upper_bound=point.certificate.upper_bound if point else None,
                    cost=test.cpu_ms_per_row / test.reference_cpu_ms_per_row if test else None,
                    same_as_reference=float(same),
                )
            )
    return outcomes


def shown(family: Family) -> list[str]:
    """The reference, to see what was gained, and the most telling of its variants; each takes replicas of its own."""
    return [name for name in SHOWN if name in family.variants]


async def question_all(
    url: str, families: dict[str, Family], rows: Sequence[dict[str, str]], options: DemoOptions, console: Console
) -> list[Outcome]:
    """Ask every served variant of every family, one variant after the other."""
    outcomes = []
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=options.connections)) as client:
        info = await (await client.get("/info")).json()
        for served in info["families"]:
            family = families[served["name"]]
            tokens = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode([row["text"] for row in rows])
            with console.status(f"answers of {family.name}'s reference"):
                reference = offline(family, family.manifest.reference, tokens)
            for variant in served["variants"]:
                with console.status(f"{len(rows)} requests to {family.name}:{variant['id']}"):
                    answers = await question(client, family, variant["id"], rows, options)
                    own = offline(family, variant["id"], tokens)
                outcomes.append(judge(family, variant["id"], rows, answers, reference, own))
    return outcomes


@dataclass(frozen=True, slots=True)
class Answers:
    """`values` float32 [rows, width] as they came over HTTP: scores, or vectors."""

    values: Floats
    alone_ms: float
    requests_per_second: float


async def question(
    client: aiohttp.ClientSession,
    family: Family,
    variant: str,
    rows: Sequence[dict[str, str]],
    options: DemoOptions,
) -> Answers:
    """First one request at a time, for the latency, then all of them from several clients, for the rate."""

    async def ask(text: str) -> Any:
        model = f"{family.name}:{variant}"
        path = "/classify" if family.manifest.task.kind is TaskKind.CLASSIFY else "/v1/embeddings"
        async with client.post(path, json={"model": model, "input": text}) as response:
            body = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{path} answered {response.status}: {body.decode()}")
            return body

    async def work(queue: list[int], replies: dict[int, bytes]) -> None:
        while queue:
            index = queue.pop()
            replies[index] = await ask(rows[index]["text"])

    times = []
    for row in rows[:ALONE_REQUESTS]:
        started = time.perf_counter()
        await ask(row["text"])
        times.append((time.perf_counter() - started) * 1000)
    queue, replies = list(reversed(range(len(rows)))), dict[int, bytes]()
    started = time.perf_counter()
    await asyncio.gather(*(work(queue, replies) for _ in range(options.connections)))
    seconds = time.perf_counter() - started
    values = np.array([_values(replies[index]) for index in range(len(rows))], np.float32)
    return Answers(values, statistics.median(times), len(rows) / seconds)


def _values(body: bytes) -> list[float]:
    (item,) = orjson.loads(body)["data"]
    values: list[float] = item["probs"] if "probs" in item else item["embedding"]
    return values


def offline(family: Family, variant: str, rows: Sequence[Row]) -> Floats:
    """The variant's answers without a server, in batches of similar length: float32 [rows, width]."""
    engine = open_engine(family.variant_path(variant), EngineOptions(threads=2, verify=False))
    lengths = [len(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: lengths[index])
    values = np.empty((len(rows), family.manifest.task.width), np.float32)
    for batch in in_batches(order, lengths, OFFLINE_ROWS, OFFLINE_TOKENS):
        values[batch] = engine.run(Rows.of([rows[index] for index in batch])).values
    engine.close()
    return values


def judge(
    family: Family,
    variant: str,
    rows: Sequence[dict[str, str]],
    answers: Answers,
    reference: Floats,
    own: Floats,
) -> Outcome:
    """Compare what was served with the reference's answers and with the variant's own offline ones."""
    manifest, task = family.variant(variant), family.manifest.task
    assert manifest.measured is not None
    # Softmax keeps the order of the logits, so scores and logits are compared by the same rule.
    changed = disagreements(answers.values, reference, task)
    moved = disagreements(answers.values, own, task)
    metric = None
    if task.kind is TaskKind.CLASSIFY:
        predicted = [task.labels[int(index)] for index in answers.values.argmax(axis=1)]
        metric = float(np.mean([label == row["label"] for label, row in zip(predicted, rows, strict=True)]))
    return Outcome(
        family=family.name,
        variant=variant,
        size_mb=manifest.size_bytes / 1e6,
        alone_ms=answers.alone_ms,
        requests_per_second=answers.requests_per_second,
        same_as_reference=1 - float(changed.mean()),
        same_as_offline=1 - float(moved.mean()),
        batch_invariant=manifest.measured.batching.invariant,
        changed_by_batching=manifest.measured.batching.changed,
        metric=metric,
    )


def report(outcomes: Sequence[Outcome], families: dict[str, Family], options: DemoOptions, console: Console) -> None:
    """The table, and how to go on."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("family:variant", no_wrap=True)
    for name in ("MB", "ms", "req/s", "same", "offline", "batch", "right"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            f"{outcome.family}:{outcome.variant}",
            f"{outcome.size_mb:.0f}",
            f"{outcome.alone_ms:.1f}",
            f"{outcome.requests_per_second:.0f}",
            f"{outcome.same_as_reference:.2%}",
            f"{outcome.same_as_offline:.2%}",
            "none" if outcome.batch_invariant else f"{outcome.changed_by_batching:.1%}",
            "" if outcome.metric is None else f"{outcome.metric:.1%}",
        )
    console.print(table)
    console.print(
        f"{options.questions} Debian package descriptions over HTTP: ms with one client, requests a second with "
        f"{options.connections}. Same: answered as the reference does. Offline: answered as the variant itself does "
        "without a server. Batch: answers that depend on who shares the batch, as optimize measured. Right: by label.",
        style="dim",
    )
    paths = [shlex.quote(str(family.directory)) for family in families.values()]
    console.print(f"The families are in {options.directory}. Look at one:  fettle show {paths[0]}", soft_wrap=True)
    console.print(f"Serve both:  fettle serve {' '.join(paths)}", soft_wrap=True)


def report_levels(levels: Sequence[Certified], family: Family, console: Console) -> None:
    """What was promised, and what the questions said."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("at most changed", "answered by", "certified", "cost", "same"):
        table.add_column(name, justify="left" if name == "answered by" else "right", no_wrap=True)
    for level in levels:
        table.add_row(
            f"{level.max_disagreement:.1%}",
            level.point or "the reference",
            "" if level.upper_bound is None else f"{level.upper_bound:.2%}",
            "" if level.cost is None else f"{level.cost:.0%}",
            f"{level.same_as_reference:.2%}",
        )
    console.print(table)
    console.print(
        "The classifier without a server, fettle.load(...).predict(texts, max_disagreement): the operating point that "
        "answers, its certified upper bound at 95 % confidence, its processor time over that of the fp32 ONNX "
        "reference, and the share of these questions that it answered as the reference does.",
        style="dim",
    )
    console.print(f"The whole story: {family.directory / 'report.html'}", soft_wrap=True)
