"""Text generation over HTTP, streamed: the family's variants beside other servers, the same prompts, the same machine.

Requests of about 128 tokens in and 64 out. First 16 streams at a time, which is the served rate; then Poisson arrivals
at three shares of that rate: time to first token, time per output token, between tokens, to the end, and goodput. At
last the served rate is set against the bare engine's, in turns. Random weights in the shape of SmolLM2-135M, unless a
model is given; a family of it is made where there is none.

    python -m benchmarks.generation_serving [--model DIR] [--variants onnx-int8] [--peers transformers,llama.cpp]
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.generation_systems import environment
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.processes import Server, ServerSpec
from benchmarks.text_models import random_model
from deployments.fastpath import free_port
from fettle.bench.crew import measure
from fettle.bench.figures import Objectives, figures
from fettle.bench.load import LoadPlan
from fettle.family import Family
from fettle.generation import Prompt, Sampling
from fettle.tokenizer import Tokenizer
from workers.engine import EngineOptions, open_runner
from workers.generator import Generator

TEXTS = Path("examples/data/debian-sections.test.jsonl.gz")
LOGS = Path("build/benchmark-logs")
MODEL, FAMILY = Path("build/benchmark-models/smollm2-135m"), Path("build/benchmark-families/smollm2-135m")
TOKENS_IN, TOKENS_OUT, STREAMS = 128, 64, 16
LOADS = (0.3, 0.6, 0.9)
GOOD = Objectives(ttft_ms=1000.0, tpot_ms=100.0)
FAMILY_NAME, FAMILY_ROWS = "lm", 16
# Random weights hardly ever end a text, but sampled tokens must not do so either.
SAMPLED = {"temperature": 0.0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class System:
    name: str
    server: Callable[[int], ServerSpec]
    body: dict[str, Any]


def main() -> None:
    options = parse(sys.argv[1:])
    machine = describe_machine()
    if not options.json:
        print("\n".join(machine_lines(machine)))
    model = options.model or random_model(MODEL)
    family = open_family(model, options.family, options.variants)
    prompts = prompts_of(family, options.texts)
    systems = [fettle_system(options.family, variant, options.threads) for variant in options.variants]
    systems += [peer_system(name, model, options.threads) for name in options.peers]
    rows = []
    rate = None
    for system in systems:
        say(system.name)
        row = measured(system, prompts, options, rate)
        name = system.name.removeprefix("fettle ")
        if name in options.variants:
            row |= {"beside_engine": beside_engine(system, name, family, prompts, options)}
        # A run takes long; who is cut off has what was found until then.
        say(json.dumps(row))
        # All meet the same arrivals: shares of what the first one serves.
        rate = rate or row["streams"]["rps"]
        rows.append(row)
    if not options.json:
        Console(width=140).print(table(rows))
    settings = {"tokens_in": TOKENS_IN, "tokens_out": TOKENS_OUT, "streams": STREAMS, "model": model.name}
    print(json.dumps({"benchmark": "generation_serving", "hardware": machine, "settings": settings, "systems": rows}))


def measured(system: System, prompts: Sequence[str], options: argparse.Namespace, rate: float | None) -> dict[str, Any]:
    with served(system, prompts, options) as plan:
        closed = load(replace(plan, connections=STREAMS, warm_up=options.warm_up))
        rate = rate or closed["rps"]
        loads = {f"{share:g}": load(replace(plan, rate=share * rate)) for share in LOADS}
    return {"system": system.name, "streams": closed, "loads": loads}


def beside_engine(
    system: System, variant: str, family: Family, prompts: Sequence[str], options: argparse.Namespace
) -> list[dict[str, float]]:
    """Tokens a second of the bare engine and, right afterwards, of the service, in turns: the machine's pace moves."""
    rounds = []
    for _ in range(options.rounds):
        engine = engine_rate(family, variant, prompts, options.threads)
        with served(system, prompts, options) as plan:
            closed = load(replace(plan, connections=STREAMS, warm_up=options.warm_up))
        rounds.append({"engine": engine, "served": closed["tokens_per_s"]})
        say(json.dumps(rounds[-1]))
    return rounds


@contextmanager
def served(system: System, prompts: Sequence[str], options: argparse.Namespace) -> Iterator[LoadPlan]:
    """The system while it runs, and what its loads have in common."""
    spec = system.server(free_port())
    texts = LOGS / "generation-prompts.jsonl"
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    with Server(spec, LOGS / f"generation-{system.name.replace(' ', '-')}.log"):
        yield LoadPlan(
            spec.url,
            None,
            texts=texts,
            kind="completions",
            seconds=options.seconds,
            warm_up=3.0,
            seed=options.seed,
            max_tokens=(TOKENS_OUT, TOKENS_OUT),
            body=system.body,
        )


def load(plan: LoadPlan) -> dict[str, Any]:
    """In a process of its own."""
    return figures(measure(plan), GOOD)


def open_family(model: Path, directory: Path, variants: Sequence[str]) -> Family:
    """Make what is missing, at as little effort as gives a family that can be served: nothing is certified."""
    if not (directory / "family.json").exists():
        say(f"a family of {model}")
        data = directory.parent / f"{directory.name}.jsonl"
        data.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(TEXTS, "rt") as texts:
            data.write_text(
                "".join(json.dumps({"text": json.loads(line)["text"]}) + "\n" for line in list(texts)[:FAMILY_ROWS])
            )
        command = [sys.executable, "-m", "fettle.cli", "optimize", str(model), "--test", str(data)]
        command += ["--out", str(directory), "--name", FAMILY_NAME, "--answer", "text"]
        for variant in variants:
            command += ["--recipe", variant]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return Family.open(directory)


def prompts_of(family: Family, texts: Path) -> list[str]:
    """Texts of `TOKENS_IN` tokens, some of several joined, cut at a token."""
    tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
    with gzip.open(texts, "rt") as lines:
        joined = " ".join(json.loads(line)["text"] for line in list(lines)[:600])
    ids = tokenizer.ids(joined, special=False)
    cut = [ids[begin : begin + TOKENS_IN] for begin in range(0, len(ids) - TOKENS_IN, TOKENS_IN)]
    return [tokenizer.text(part.tolist()) for part in cut[:200]]


def engine_rate(family: Family, variant: str, prompts: Sequence[str], threads: int, seconds: float = 10.0) -> float:
    """Tokens a second of the bare generator with `STREAMS` texts at a time, prompts included."""
    runner = open_runner(family.variant_path(variant), EngineOptions(threads=threads))
    generator = Generator(runner, memory_bytes=1 << 30, max_slots=STREAMS)
    tokenizer = Tokenizer(family.tokenizer_path, family.manifest.tokenizer)
    rows = [tokenizer.ids(prompt, special=False) for prompt in prompts]
    begun, tokens, counted_from = 0, 0, None
    started = time.perf_counter()
    while (now := time.perf_counter()) - started < seconds + 3.0:
        if counted_from is None and now - started > 3.0:
            counted_from, tokens = now, 0
        while generator.alive + generator.waiting < STREAMS:
            ids = np.asarray(rows[begun % len(rows)], np.int32)
            generator.submit(Prompt(str(begun), ids, TOKENS_OUT, Sampling(temperature=0.0)))
            begun += 1
        tokens += sum(len(step.tokens) for step in generator.step())
    generator.close()
    assert counted_from is not None
    return round(tokens / (time.perf_counter() - counted_from), 1)


def fettle_system(family: Path, variant: str, threads: int) -> System:
    model = f"{FAMILY_NAME}:{variant}"

    def server(port: int) -> ServerSpec:
        command = [sys.executable, "-m", "fettle.cli", "serve", str(family.absolute()), "--port", str(port)]
        command += ["--variant", variant, "--default", variant, "--threads", str(threads), "--no-dashboard"]
        command += ["--min-replicas", "1", "--max-replicas", "1"]
        return _spec(command, port, model)

    return System(f"fettle {variant}", server, {"model": model, **SAMPLED})


def peer_system(name: str, model: Path, threads: int) -> System:
    match name:
        case "transformers":
            return _transformers(model)
        case "llama.cpp":
            return _llama(model, threads)
    sys.exit(f"no peer {name!r}; there are transformers and llama.cpp")


def _llama(model: Path, threads: int) -> System:
    """llama-cpp-python's server, 4 bits; it answers one request after the other."""
    python = environment(Path("build/peer-llama"), "llama_cpp")

    def server(port: int) -> ServerSpec:
        command = [python, "-m", "benchmarks.peers.llama_server", "--model", str(model.absolute())]
        command += ["--file", str(model.absolute()) + ".Q4_0.gguf", "--threads", str(threads), "--port", str(port)]
        return _spec(command, port, "lm")

    # Random weights hardly ever end a text.
    return System("llama.cpp server", server, {"model": "lm", "temperature": 0.0})


def _transformers(model: Path) -> System:
    """`transformers serve` with continuous batching, as it comes (bfloat16)."""
    python = environment(Path("build/peer-transformers"), "accelerate")

    def server(port: int) -> ServerSpec:
        command = [str(Path(python).with_name("transformers")), "serve", str(model.absolute())]
        command += ["--continuous-batching", "--device", "cpu", "--dtype", "bfloat16", "--port", str(port)]
        return _spec(command, port, str(model.absolute()))

    # It knows no way to go on past an end token; random weights give none.
    return System("transformers serve", server, {"model": str(model.absolute()), "temperature": 0.0})


def _spec(command: Sequence[str], port: int, model: str) -> ServerSpec:
    probe = json.dumps({"model": model, "prompt": "Are you there?", "max_tokens": 2}).encode()
    return ServerSpec(command, f"http://127.0.0.1:{port}/v1/completions", probe)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(f"{TOKENS_IN} tokens in, {TOKENS_OUT} out; ms at p50 / p99")
    for name in (
        "load",
        "requests/s",
        "tokens/s",
        "of engine",
        "TTFT",
        "TPOT",
        "between",
        "whole",
        "goodput/s",
    ):
        made.add_column(name, justify="right")
    for row in rows:
        shares = [each["served"] / each["engine"] for each in row.get("beside_engine", [])]
        for name, found in {f"{STREAMS} streams": row["streams"], **row["loads"]}.items():
            # What is missing: nothing was answered.
            tokens = found.get("tokens_per_s", 0.0)
            share = f"{statistics.median(shares):.0%}" if shares and "streams" in name else ""
            parts = [found.get(part, {}) for part in ("ttft_ms", "tpot_ms", "inter_token_ms")] + [found]
            times = [f"{part.get('p50_ms')} / {part.get('p99_ms')}" for part in parts]
            made.add_row(
                row["system"],
                name,
                str(found["rps"]),
                str(tokens),
                share,
                *times,
                str(found["goodput_rps"]),
            )
    return made


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation_serving", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; random weights if not given")
    parser.add_argument("--family", type=Path, default=FAMILY, help="made of the model where there is none")
    parser.add_argument("--variants", type=names, default="onnx-int8")
    parser.add_argument("--peers", type=names, default="transformers,llama.cpp")
    parser.add_argument("--threads", type=int, default=2, help="of the one replica")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--warm-up", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3, help="of the bare engine and the service in turns")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    return parser.parse_args(arguments)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
