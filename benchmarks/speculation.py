"""Guessing ahead on a real model: a cheap variant drafts, or look-up does, and a float32 one checks.

    python -m benchmarks.speculation FAMILY [--variant onnx-fp32] [--drafts onnx-int8,onnx-int4] [--texts 20]

Each text is generated alone, as at low load, once in every way: plainly, by each drafter, and by all of them together.
The prompts are the beginnings of the bundled texts, to be continued, greedy and sampled. Whatever is guessed, a text
must be what it is without; the number of texts that are not is in the table. Times are of the same texts, in turns.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, machine_lines
from fettle.family import Family
from fettle.generation import Prompt, Sampling
from fettle.tokenizer import Tokenizer
from workers.engine import EngineOptions, open_runner
from workers.generator import Generator
from workers.speculation import Drafter, DraftModel, PromptLookup, Speculation

TEXTS = Path("examples/data/debian-sections.test.jsonl.gz")
MEMORY_BYTES = 1 << 29
SAMPLINGS = {"greedy": Sampling(temperature=0.0), "temperature 0.8": Sampling(temperature=0.8, seed=1)}


@dataclass
class Way:
    """One way to generate, and what it gave: seconds and tokens, by sampling."""

    name: str
    generator: Generator
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    different: int = 0

    def rate(self, sampling: str) -> float:
        return self.tokens[sampling] / self.seconds[sampling]


def main() -> None:
    options = _options()
    machine = describe_machine()
    console = Console(stderr=options.json, width=140)
    console.print("\n".join(machine_lines(machine)), markup=False, highlight=False)
    family = Family.open(options.family)
    ways = _ways(family, options)
    prompts = _prompts(family, options)
    for name, sampling in SAMPLINGS.items():
        for number, ids in enumerate(prompts):
            texts = [_generate(way, name, Prompt(f"{name} {number}", ids, options.tokens, sampling)) for way in ways]
            for way, text in zip(ways, texts, strict=True):
                way.different += text != texts[0]
    rows = [_row(way, ways[0]) for way in ways]
    if not options.json:
        _print(console, rows)
    print(json.dumps({"machine": machine, "variant": options.variant, "tokens": options.tokens, "ways": rows}))
    if any(way.different for way in ways):
        sys.exit("a guess changed a text")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", type=Path)
    parser.add_argument("--variant", default="onnx-fp32")
    parser.add_argument("--drafts", type=lambda text: text.split(","), default=["onnx-int8", "onnx-int4"])
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=96, help="of a text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    return parser.parse_args()


def _ways(family: Family, options: argparse.Namespace) -> list[Way]:
    engine = EngineOptions(threads=options.threads)

    def draft(name: str) -> DraftModel:
        return DraftModel(open_runner(family.variant_path(name), engine), options.prompt + options.tokens)

    named: dict[str, list[Drafter]] = {"plain": [], "look-up": [PromptLookup()]}
    named.update({name: [draft(name)] for name in options.drafts})
    named["look-up and " + options.drafts[0]] = [PromptLookup(), draft(options.drafts[0])]
    ways = []
    for name, drafters in named.items():
        runner = open_runner(family.variant_path(options.variant), engine)
        runner.warm_up()
        speculation = Speculation(drafters) if drafters else None
        ways.append(Way(name, Generator(runner, MEMORY_BYTES, max_slots=1, speculation=speculation)))
    return ways


def _prompts(family: Family, options: argparse.Namespace) -> list[np.ndarray]:
    tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
    with gzip.open(TEXTS, "rt") as lines:
        texts = (tokenizer.ids(json.loads(line)["text"], special=True) for line in lines)
        long = (ids[: options.prompt] for ids in texts if len(ids) >= options.prompt)
        found = list(itertools.islice(long, options.texts))
    if len(found) < options.texts:
        sys.exit(
            f"only {len(found)} bundled texts have {options.prompt} tokens; ask for shorter prompts or fewer texts"
        )
    return found


def _generate(way: Way, sampling: str, prompt: Prompt) -> list[int]:
    began = time.perf_counter()
    way.generator.submit(prompt)
    tokens: list[int] = []
    while way.generator.busy:
        for step in way.generator.step():
            if step.error is not None:
                raise step.error
            tokens += [token.id for token in step.tokens]
    way.seconds[sampling] = way.seconds.get(sampling, 0.0) + time.perf_counter() - began
    way.tokens[sampling] = way.tokens.get(sampling, 0) + len(tokens)
    return tokens


def _row(way: Way, plain: Way) -> dict[str, Any]:
    stats = way.generator.stats
    return {
        "way": way.name,
        "tokens_per_second": {name: round(way.rate(name), 1) for name in SAMPLINGS},
        "times_plain": {name: round(way.rate(name) / plain.rate(name), 2) for name in SAMPLINGS},
        "accepted": round(stats.accepted / stats.drafted, 3) if stats.drafted else None,
        "steps_per_token": round(stats.decode_steps / max(1, stats.decode_rows), 3),
        "different_texts": way.different,
    }


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("guesses by")
    for name in (*(f"{name}, tokens/s (x plain)" for name in SAMPLINGS), "right", "steps a token", "texts changed"):
        table.add_column(name, justify="right")
    for row in rows:
        rates = [f"{row['tokens_per_second'][name]:.0f} ({row['times_plain'][name]:.2f})" for name in SAMPLINGS]
        right = "" if row["accepted"] is None else f"{row['accepted']:.0%}"
        table.add_row(row["way"], *rates, right, f"{row['steps_per_token']:.2f}", str(row["different_texts"]))
    console.print(table)


if __name__ == "__main__":
    main()
