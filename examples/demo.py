"""`fettle demo`: the main job from end to end on real data, in a few minutes on two cores, without the network.

Fine-tunes a classifier, optimizes it and the embedding model it came from, serves both families on Ray, asks every
served variant and every quality class real questions over HTTP, compares each answer with the reference's and with what
the same variant or operating point answers without a server, and prints tables and one JSON line.
"""

from __future__ import annotations

import asyncio
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
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
from fettle.local import LocalFamily
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
class Asked:
    """One quality class of the classifier, over HTTP. Shares are of the questions asked, in [0, 1].

    `points`: the share that each operating point (or the reference) answered, as the load had it; `bound`: the weakest
    that a reply named, 0 for the reference's own answers; `same_as_predict`: as the same point answers alone.
    """

    max_disagreement: float
    bound: float
    points: dict[str, float]
    alone_ms: float
    requests_per_second: float
    same_as_reference: float
    same_as_predict: float


def run(options: DemoOptions, console: Console) -> tuple[list[Outcome], list[Asked]]:
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
    served = ServeConfig(
        families=[FamilyConfig(path=str(family.directory), variants=shown(family)) for family in families.values()],
        replicas=ReplicaConfig(min_replicas=options.replicas, max_replicas=options.replicas),
    )
    with ExitStack() as service:
        with console.status("starting Ray and the replicas"):
            url = service.enter_context(running(served, ServerOptions(port=options.port, dashboard=False)))
        outcomes, asked = asyncio.run(question_all(url, families, rows, options, console))
    report(outcomes, families, options, console)
    report_classes(asked, families[CLASSIFIER], options, console)
    return outcomes, asked


def figures(options: DemoOptions, console: Console) -> dict[str, object]:
    """The same as plain values."""
    outcomes, asked = run(options, console)
    return {"variants": [asdict(row) for row in outcomes], "classes": [asdict(row) for row in asked]}


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


def shown(family: Family) -> list[str]:
    """The reference, the most telling of its variants, and those of its points; each takes replicas of its own."""
    used = [step.variant for point in family.manifest.points for step in point.steps]
    return list(dict.fromkeys([name for name in SHOWN if name in family.variants] + used))


async def question_all(
    url: str, families: dict[str, Family], rows: Sequence[dict[str, str]], options: DemoOptions, console: Console
) -> tuple[list[Outcome], list[Asked]]:
    """Ask every served variant of every family, one variant after the other; then every class of the classifier."""
    outcomes, asked = [], []
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=options.connections)) as client:
        info = await (await client.get("/info")).json()
        for served in info["families"]:
            family = families[served["name"]]
            tokens = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode([row["text"] for row in rows])
            with console.status(f"answers of {family.name}'s reference"):
                reference = offline(family, family.manifest.reference, tokens)
            for variant in served["variants"]:
                model = f"{family.name}:{variant['id']}"
                with console.status(f"{len(rows)} requests to {model}"):
                    answers = await question(client, family, {"model": model}, rows, options)
                    own = offline(family, variant["id"], tokens)
                outcomes.append(judge(family, variant["id"], rows, answers, reference, own))
            if family.name == CLASSIFIER:
                asked = await question_classes(client, family, rows, reference, options, console)
    return outcomes, asked


async def question_classes(
    client: aiohttp.ClientSession,
    family: Family,
    rows: Sequence[dict[str, str]],
    reference: Floats,
    options: DemoOptions,
    console: Console,
) -> list[Asked]:
    """Ask in every class that the family has a certificate for, and exactly."""
    asked = []
    with fettle.load(family.directory) as local:
        assert isinstance(local, LocalFamily)
        for level in [0.0, *sorted(point.certificate.alpha for point in family.manifest.points)]:
            wish = {"model": family.name, "max_disagreement": level or "exact"}
            with console.status(f"{len(rows)} requests of class {level or 'exact'}"):
                answers = await question(client, family, wish, rows, options)
                asked.append(judge_class(level, family, local, rows, answers, reference))
    return asked


def judge_class(
    level: float,
    family: Family,
    local: LocalFamily,
    rows: Sequence[dict[str, str]],
    answers: Answers,
    reference: Floats,
) -> Asked:
    """Compare a class's answers with the reference's, and with what the points that gave them answer by themselves."""
    said = [reply["fettle"] for reply in answers.replies]
    points = {point.id: point for point in family.manifest.points}
    alphas = [points[each["point"]].certificate.alpha if each["point"] else 0.0 for each in said]
    own: dict[tuple[int, float], Any] = {}
    for alpha in set(alphas):
        mine = [index for index, other in enumerate(alphas) if other == alpha]
        found = local.predict([rows[index]["text"] for index in mine], alpha)
        own |= {(index, alpha): prediction.answer for index, prediction in zip(mine, found, strict=True)}
    labels = [reply["data"][0]["label"] for reply in answers.replies]
    names = Counter(each["point"] or each["variant"] for each in said)
    return Asked(
        max_disagreement=level,
        bound=max(0.0 if each["bound"] == "exact" else each["bound"] for each in said),
        points={name: count / len(said) for name, count in names.items()},
        alone_ms=answers.alone_ms,
        requests_per_second=answers.requests_per_second,
        same_as_reference=float(1 - disagreements(answers.values, reference, family.manifest.task).mean()),
        same_as_predict=float(
            np.mean([own[key] == label for key, label in zip(enumerate(alphas), labels, strict=True)])
        ),
    )


@dataclass(frozen=True, slots=True)
class Answers:
    """`values` float32 [rows, width] as they came over HTTP: scores, or vectors; and the whole `replies`."""

    values: Floats
    replies: list[dict[str, Any]]
    alone_ms: float
    requests_per_second: float


async def question(
    client: aiohttp.ClientSession,
    family: Family,
    wish: dict[str, Any],
    rows: Sequence[dict[str, str]],
    options: DemoOptions,
) -> Answers:
    """First one request at a time, for the latency, then all of them from several clients, for the rate."""

    async def ask(text: str) -> Any:
        path = "/classify" if family.manifest.task.kind is TaskKind.CLASSIFY else "/v1/embeddings"
        async with client.post(path, json={**wish, "input": text}) as response:
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
    read = [orjson.loads(replies[index]) for index in range(len(rows))]
    return Answers(
        np.array([_values(reply) for reply in read], np.float32), read, statistics.median(times), len(rows) / seconds
    )


def _values(reply: dict[str, Any]) -> list[float]:
    (item,) = reply["data"]
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


def report_classes(asked: Sequence[Asked], family: Family, options: DemoOptions, console: Console) -> None:
    """What was promised, and what the questions said."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("at most", "certified", "answered by", "ms", "req/s", "same", "predict"):
        table.add_column(name, justify="left" if name == "answered by" else "right", no_wrap=True)
    for row in asked:
        names = sorted(row.points, key=lambda name: -row.points[name])
        table.add_row(
            f"{row.max_disagreement:.1%}" if row.max_disagreement else "exact",
            f"{row.bound:.2%}" if row.bound else "the original",
            ", ".join(f"{name} {row.points[name]:.0%}" for name in names[:2]),
            f"{row.alone_ms:.1f}",
            f"{row.requests_per_second:.0f}",
            f"{row.same_as_reference:.2%}",
            f"{row.same_as_predict:.2%}",
        )
    console.print(table)
    console.print(
        "The classifier over HTTP, by what a request asked for in max_disagreement: the weakest certified bound of a "
        f"reply (95 % confidence), the points that answered {options.connections} clients at a time (stricter ones "
        "while the load lets them), and the shares answered as the original does, and as fettle.load(...).predict.",
        style="dim",
    )
    console.print(f"The whole story: {family.directory / 'report.html'}", soft_wrap=True)
