"""`fettle demo --task generation`: a small language model from its checkpoint to streams of text over HTTP.

Optimizes the bundled model on questions about Debian packages, serves the family on Ray, and asks over HTTP with the
shapes of OpenAI's API: a few questions whose answers are shown as they come, then many in every quality class, with
early stops and votes, and streams of every variant for their speed. Prints tables that say what is seen.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
from rich.console import Console

from deployments.server import ServerOptions, running
from examples.finetune import DATA, read_rows
from examples.text_client import Json, Speed, TextClient, answer_of, finish_of, piece_of
from examples.text_tables import EARLY, AskedTexts, VariantSpeed, report_speeds, report_ways
from examples.train_language_model import SECTION_QUESTION
from fettle.config import DataFiles, FamilyConfig, OptimizeConfig, ReplicaConfig, ServeConfig
from fettle.extract import Extract, extractor
from fettle.family import Family
from optimize.pipeline import run as optimize
from optimize.progress import Progress

NAME = "debian-lm"
MODEL = DATA / NAME
MOST_TOKENS = 16
# Of each split: what 1 % takes, and what a few minutes allow.
SPLIT_ROWS = {"train": 2000, "validation": 1500, "calibration": 5000, "test": 500}
SHOWN_ROWS = 3
WIDTH = 79
ALONE_REQUESTS = 20
OWN_STOP = {"answer_confidence": 0.6}
CANDIDATES = 8
VOTE_TEMPERATURE = 0.7
DESCRIBE = "Describe the package {name} from the section {section}."
PACKAGES = [
    *(("libpng-tools", "graphics"), ("python3-redis", "python"), ("fonts-lato", "fonts"), ("gnome-maps", "gnome")),
    *(("ruby-json", "ruby"), ("golang-yaml-dev", "golang"), ("chess-engine", "games"), ("mailsync", "mail")),
]
# Each of the streams that are timed has exactly so many tokens, whatever the model would say.
SPEED_TOKENS = 64
SPEED_WISH = {"temperature": 0, "ignore_eos": True, "max_tokens": SPEED_TOKENS}


@dataclass(frozen=True, slots=True)
class TextDemoOptions:
    """`questions` are asked in each class, and texts streamed by each variant, by `streams` clients at a time.

    `split_rows`: how many rows of each split `optimize` gets; `recipes`: what it builds, None for what it chooses.
    """

    directory: Path
    port: int = 8000
    questions: int = 300
    streams: int = 16
    split_rows: Mapping[str, int] | None = None
    recipes: Sequence[str] | None = None


def run(options: TextDemoOptions, console: Console) -> tuple[list[AskedTexts], list[VariantSpeed]]:
    """Everything, with progress on `console`; what is there from an earlier run is not made again."""
    family = make_family(options, console)
    rows = read_rows("test")[: options.questions]
    served = ServeConfig(
        families=[FamilyConfig(path=str(family.directory), name=NAME, variants=shown(family))],
        replicas=ReplicaConfig(min_replicas=1, max_replicas=1),
    )
    with ExitStack() as service:
        with console.status("starting Ray and the replicas"):
            url = service.enter_context(running(served, ServerOptions(port=options.port, dashboard=False)))
        asked, speeds = asyncio.run(question_all(url, family, rows, options, console))
    report_ways(asked, options.questions, options.streams, console)
    report_speeds(speeds, console)
    path = shlex.quote(str(family.directory))
    console.print(f"Look at the family:  fettle show {path}", soft_wrap=True, highlight=False)
    console.print(f"Serve it:            fettle serve {path}", soft_wrap=True, highlight=False)
    return asked, speeds


def figures(options: TextDemoOptions, console: Console) -> dict[str, object]:
    """The same as plain values."""
    asked, speeds = run(options, console)
    return {"classes": [asdict(row) for row in asked], "variants": [asdict(row) for row in speeds]}


def make_family(options: TextDemoOptions, console: Console) -> Family:
    """Optimize the bundled model on section questions; a family that is complete is only checked."""
    config = OptimizeConfig(
        model=str(MODEL),
        out=options.directory / NAME,
        files=DataFiles.model_validate(question_files(options)),
        name=NAME,
        prompt=SECTION_QUESTION,
        answer="labels",
        max_tokens=MOST_TOKENS,
        recipes=None if options.recipes is None else list(options.recipes),
    )
    prompt = SECTION_QUESTION.replace("\n", "\\n")
    console.print(
        f"[bold]fettle optimize {shlex.quote(str(MODEL))} --prompt '{prompt}' --answer labels "
        f"--max-tokens {MOST_TOKENS} --out {shlex.quote(str(config.out))}[/bold]",
        highlight=False,
    )
    return optimize(config, Progress(console))


def question_files(options: TextDemoOptions) -> dict[str, Path]:
    """The first rows of each split, as files beside the family."""
    folder = options.directory / "questions"
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, count in (options.split_rows or SPLIT_ROWS).items():
        lines = [json.dumps(row) + "\n" for row in read_rows(split)[:count]]
        files[split] = folder / f"{split}.jsonl.gz"
        # The same rows are the same bytes, so that a second run finds its work done.
        files[split].write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return files


def shown(family: Family) -> list[str]:
    """The reference, the variants of its points, and the fastest ones; each takes a replica of its own."""
    used = [step.variant for point in family.manifest.points for step in point.steps]
    measured = [name for name, variant in family.variants.items() if variant.measured is not None]
    measured.sort(key=lambda name: family.variants[name].measured.row_cpu_ms or 0.0)  # type: ignore[union-attr]
    return list(dict.fromkeys([family.manifest.reference, family.manifest.default, *used, *measured[:2]]))


async def question_all(
    url: str, family: Family, rows: Sequence[dict[str, str]], options: TextDemoOptions, console: Console
) -> tuple[list[AskedTexts], list[VariantSpeed]]:
    """A few answers as they come, then every way of asking, then every variant's speed."""
    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=limits) as session:
        client = TextClient(session)
        info = await client.get("/info")
        variants = [variant["id"] for served in info["families"] for variant in served["variants"]]
        for variant in variants:
            # A replica's first text is slower than all others.
            await client.ask("warm up", {"model": f"{NAME}:{variant}", "max_tokens": 2})
        await show_streams(client, rows[:SHOWN_ROWS], console)
        asked = await ask_every_way(client, family, rows, options, console)
        speeds = []
        for variant in variants:
            with console.status(f"streams of {variant}"):
                speeds.append(await measure_speed(client, family, variant, options))
    return asked, speeds


async def show_streams(client: TextClient, rows: Sequence[dict[str, str]], console: Console) -> None:
    """Questions with their answers, printed as the pieces come."""
    console.print("\n[bold]Which section does this package belong to?[/bold]")
    for row in rows:
        console.print(f"  {shortened(row['text'], WIDTH - 2)}", markup=False, highlight=False)
        question = SECTION_QUESTION.format(text=row["text"])
        told = await _show(client, question, {"temperature": 0}, "  -> ", console)
        console.print(f"     {_promise(told)}; the archive says {row['label']}", style="dim", highlight=False)
    console.print("\n[bold]Describe a package[/bold] (what it says is made up):")
    for number, (name, section) in enumerate(PACKAGES[:2]):
        wish = {"temperature": 0.7, "seed": number, "max_tokens": 80}
        await _show(client, DESCRIBE.format(name=name, section=section), wish, f"  {name}: ", console)


async def _show(client: TextClient, question: str, wish: Json, lead: str, console: Console) -> Json:
    """Print an answer as it comes; who gave it is told with the last chunk."""
    told: Json = {}
    column, rest = 0, lead
    async for chunk in client.pieces(question, {"model": NAME, **wish}):
        told = chunk.get("fettle", told)
        # A word goes out when the next one begins, so that lines break between words.
        *words, rest = re.split(r"(?<=\s)(?=\S)", rest + piece_of(chunk).replace("\n", " "))
        for word in words:
            column = _put(word, column, console)
    _put(rest, column, console)
    console.print()
    return told


def _put(word: str, column: int, console: Console) -> int:
    """Print a word, on a new line where the present one is full; returns the column after it."""
    if column and column + len(word.rstrip()) > WIDTH:
        console.print("\n     ", end="")
        column = 5
    console.print(word, end="", markup=False, highlight=False, soft_wrap=True)
    return column + len(word)


def _promise(told: Json) -> str:
    match told["bound"]:
        case "exact":
            return "the original's own answer"
        case "none":
            return f"by {told['variant']}"
        case bound:
            return f"by {told['point']} (at most {bound:.2%} differ)"


async def ask_every_way(
    client: TextClient, family: Family, rows: Sequence[dict[str, str]], options: TextDemoOptions, console: Console
) -> list[AskedTexts]:
    """In every class that the family has a certificate for, exactly, with a client's own early stop, and by vote."""
    assert family.manifest.task.answer is not None
    judge = Judge(extractor(family.manifest.task.answer), rows)
    greedy = {"temperature": 0, "max_tokens": MOST_TOKENS}
    ways: dict[str, Json] = {"exact": {**greedy, "max_disagreement": "exact"}}
    for level in sorted(point.certificate.alpha for point in family.manifest.points):
        ways[f"at most {100 * level:g} %"] = {**greedy, "max_disagreement": level}
    ways["own early stop"] = {**greedy, "max_disagreement": "exact", "early_stop": OWN_STOP}
    # Of the variant that is as the original and the fastest of those: a vote takes many texts.
    ways[f"vote of {CANDIDATES}"] = {
        **{"model": f"{NAME}:{family.manifest.default}", "max_tokens": MOST_TOKENS},
        **{"temperature": VOTE_TEMPERATURE, "n": CANDIDATES, "answers": "vote", "seed": 0},
    }
    asked = []
    for name, wish in ways.items():
        with console.status(f"{len(rows)} questions: {name}"):
            asked.append(await ask_one_way(client, name, {"model": NAME, **wish}, judge, options))
    return asked


async def ask_one_way(client: TextClient, name: str, wish: Json, judge: Judge, options: TextDemoOptions) -> AskedTexts:
    """First one question at a time, for the latency, then all of them by several clients, for the rate."""
    times = []
    loop = asyncio.get_running_loop()
    for question in judge.questions[:ALONE_REQUESTS]:
        started = loop.time()
        await client.ask(question, wish)
        times.append(1000 * (loop.time() - started))
    replies, rate = await client.ask_all(judge.questions, wish, options.streams)
    return judge.judge(name, replies, statistics.median(times), rate)


class Judge:
    """Compares answers with the reference's, which are those of the first way that it judges, and with the labels."""

    def __init__(self, extract: Extract, rows: Sequence[dict[str, str]]) -> None:
        self.questions = [SECTION_QUESTION.format(text=row["text"]) for row in rows]
        self._extract = extract
        self._labels = [row["label"] for row in rows]
        self._reference: list[str] | None = None

    def judge(self, wish: str, replies: Sequence[Json], alone_ms: float, rate: float) -> AskedTexts:
        texts = [answer_of(reply) for reply in replies]
        if self._reference is None:
            self._reference = texts
        told = [reply["fettle"] for reply in replies]
        bounds = [0.0 if each["bound"] == "exact" else each["bound"] for each in told]
        answered = Counter(each["point"] or each["variant"] for each in told)
        early = Counter(finish_of(reply) for reply in replies)
        drawn = [vote["drawn"] for each in told for vote in each.get("votes", [])]
        answers = list(map(self._extract, texts))
        count = len(replies)
        return AskedTexts(
            wish=wish,
            bound=None if drawn or "none" in bounds else max(bounds),
            answered={name: number / count for name, number in answered.items()},
            early={name: early[name] / count for name in EARLY if early[name]},
            tokens=statistics.mean(map(_drawn, replies)),
            candidates=statistics.mean(drawn) if drawn else 1.0,
            alone_ms=alone_ms,
            answers_per_second=rate,
            same_as_reference=_share(answers, list(map(self._extract, self._reference))),
            right=_share([answer.value for answer in answers], self._labels),
        )


async def measure_speed(client: TextClient, family: Family, variant: str, options: TextDemoOptions) -> VariantSpeed:
    """Streams of texts of equal length: one at a time, then `options.streams` at a time."""
    questions = [DESCRIBE.format(name=name, section=section) for name, section in PACKAGES]
    wish = {"model": f"{NAME}:{variant}", **SPEED_WISH}
    alone = await client.speed(questions[:4], wish, 1)
    many: Speed = await client.speed(questions * -(-3 * options.streams // len(questions)), wish, options.streams)
    manifest = family.variant(variant)
    measured = manifest.measured
    return VariantSpeed(
        variant=variant,
        size_mb=manifest.size_bytes / 1e6,
        same_as_reference=None if measured is None else 1 - measured.quality.disagreement,
        alone_first_ms=alone.first_ms,
        alone_tokens_per_second=alone.tokens_per_second,
        streams=options.streams,
        text_tokens=SPEED_TOKENS,
        first_ms=many.first_ms,
        tokens_per_second=many.tokens_per_second,
    )


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _drawn(reply: Json) -> int:
    """Usage counts no token that ends a text."""
    tokens: int = reply["usage"]["completion_tokens"]
    return tokens + (finish_of(reply) == "stop")


def _share(found: Sequence[object], expected: Sequence[object]) -> float:
    return sum(one == other for one, other in zip(found, expected, strict=True)) / max(1, len(found))
