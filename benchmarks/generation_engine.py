"""Text generation by bare engines on the CPU: Fettle's ONNX variants, llama.cpp, transformers, OpenVINO GenAI.

    python -m benchmarks.generation_engine [--peers llama.cpp-Q4_0,openvino-int4] [--ours int8,int4] [--rounds 3]

All have the same random weights in the shape of SmolLM2-135M, and the same threads. *Prefill* is from a prompt to its
first token, prompts one by one; *decode* is of so many texts together, each 128 tokens long to begin with, greedy, with
what the engine does around the model (its scheduler, its drawing). No prompt shares anything with another.

Rounds go through all systems in turn, and figures are medians over them; a measurement that other programs disturbed is
made again, up to twice. Prints a table, then one JSON line. Environments of the peers, and files, go to `build/`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.generation_systems import (
    MORE_OURS,
    MORE_PEERS,
    OURS,
    PEERS,
    SHAPE,
    Agent,
    System,
    make_model,
    our_system,
    peer_system,
)
from benchmarks.machine import describe_machine, machine_lines
from benchmarks.meter import busy_seconds
from fettle.machine import usable_cores

BUILD = Path("build")
CHECKED_PROMPTS, CHECKED_TOKENS, CHECKED_LENGTH = 8, 8, 32
WARN_OTHERS = 0.05
TRIES = 3
# No prompt that is timed may have been seen before: an engine may remember it.
WARM_UP_SEED = 999_999


@dataclass(frozen=True, slots=True)
class Cell:
    """What is timed: `texts` prompts of `length` tokens, then `tokens` more of each; 0 for prompts one by one."""

    texts: int
    length: int
    tokens: int

    @property
    def name(self) -> str:
        return f"decode {self.texts}" if self.tokens else f"prefill {self.length}"

    @property
    def counted(self) -> int:
        return self.texts * (self.tokens or self.length)


@dataclass
class Results:
    """Tokens a second and the share of the machine that others took, by system and cell, a value a round."""

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    others: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    same: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, system: str, cell: Cell, rate: float, others: float) -> None:
        self.rates.setdefault(system, {}).setdefault(cell.name, []).append(rate)
        self.others.setdefault(system, {}).setdefault(cell.name, []).append(others)

    def median(self, system: str, cell: Cell) -> float | None:
        found = self.rates.get(system, {}).get(cell.name)
        return statistics.median(found) if found else None


def main() -> None:
    options = _options()
    machine = describe_machine()
    console = Console(stderr=options.json, width=160)
    console.print("\n".join(machine_lines(machine)), markup=False, highlight=False)
    folder = options.build / "generation-engine"
    checkpoint = make_model(folder, options.layers)
    results = Results()
    systems = _systems(options, checkpoint, results)
    cells = [Cell(max(1, 512 // length), length, 0) for length in options.prefills]
    cells += [Cell(texts, options.context, options.tokens) for texts in options.batches]
    with contextlib.ExitStack() as stack:
        agents = _started(stack, systems, folder / "logs", results)
        _check(agents, results)
        for turn in range(options.rounds):
            for agent in agents:
                _say(f"round {turn + 1} of {options.rounds}: {agent.system.name}")
                _measure(agent, cells, turn, results)
        for agent in agents:
            results.memory[agent.system.name] = round(agent.memory_bytes() / 1e6, 1)
    report = _report(systems, cells, results)
    if not options.json:
        _print(console, systems, cells, results)
    setting = {
        "layers": options.layers,
        "threads": options.threads,
        "rounds": options.rounds,
        "context": options.context,
        "tokens": options.tokens,
    }
    print(json.dumps({"machine": machine, "setting": setting, **report}))
    if results.failed:
        sys.exit(1)


def _options() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    def numbers(text: str) -> list[int]:
        return [int(number) for number in names(text)]

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation_engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", type=names, default=list(PEERS), help=f"of {', '.join(PEERS + MORE_PEERS)}")
    parser.add_argument("--ours", type=names, default=list(OURS), help=f"of {', '.join(OURS + MORE_OURS)}")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 16, 32], help="texts that decode together")
    parser.add_argument("--prefills", type=numbers, default=[128, 512], help="tokens of a prompt")
    parser.add_argument("--context", type=int, default=128, help="tokens of each text before it is decoded")
    parser.add_argument("--tokens", type=int, default=32, help="decoded of each text while the clock runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer, to try the benchmark")
    parser.add_argument("--build", type=Path, default=BUILD, help="where environments and files are, or are made")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    options = parser.parse_args()
    for name in options.peers:
        if name not in PEERS + MORE_PEERS:
            parser.error(f"no peer is called {name!r}")
    for name in options.ours:
        if name not in OURS + MORE_OURS:
            parser.error(f"Fettle has no variant {name!r} here")
    return options


def _systems(options: argparse.Namespace, checkpoint: Path, results: Results) -> list[System]:
    """Peers first. Whatever they need is made now, one after the other, and not while the clock runs."""
    found = []
    for name in options.peers:
        _say(f"prepare {name}")
        try:
            found.append(peer_system(name, checkpoint, options.build, options.threads))
        except (OSError, subprocess.CalledProcessError) as error:  # venv, pip, a compiler: the others go on
            results.failed[name] = str(error)
    for name in options.ours:
        _say(f"prepare {name}")
        found.append(our_system(name, checkpoint, options.threads))
    return found


def _started(stack: contextlib.ExitStack, systems: list[System], logs: Path, results: Results) -> list[Agent]:
    agents = []
    for system in systems:
        _say(f"start {system.name}")
        try:
            agents.append(stack.enter_context(Agent(system, logs / f"{system.name.replace(' ', '-')}.log")))
        except RuntimeError as error:
            results.failed[system.name] = str(error)
    return agents


def _check(agents: list[Agent], results: Results) -> None:
    """How many greedy tokens are those of the first system with float32 weights. Quantization moves tokens of random
    weights easily; a wrong conversion moves all of them."""
    prompts = _prompts(CHECKED_PROMPTS, CHECKED_LENGTH, seed=0)
    told = {agent.system.name: agent.ask("greedy", prompts, CHECKED_TOKENS)["tokens"] for agent in agents}
    exact = next((name for name in told if name.lower().endswith(("fp32", "f32"))), None)
    if exact is None:
        return
    for name, tokens in told.items():
        results.same[name] = round(float(np.mean(np.array(tokens) == np.array(told[exact]))), 3)


def _measure(agent: Agent, cells: Sequence[Cell], turn: int, results: Results) -> None:
    # Memory, caches and thread pools as they are when work goes on.
    for length in sorted({cell.length for cell in cells}):
        agent.ask("decode", _prompts(1, length, WARM_UP_SEED), 4)
    for cell in cells:
        results.add(agent.system.name, cell, *_undisturbed(agent, cell, 100 * turn))


def _undisturbed(agent: Agent, cell: Cell, seed: int) -> tuple[float, float]:
    """Tokens a second, and the share of the machine that others took: the least disturbed of up to `TRIES` tries."""
    tries: list[tuple[float, float]] = []
    while len(tries) < TRIES and not any(others <= WARN_OTHERS for _, others in tries):
        tries.append(_timed(agent, cell, seed + len(tries)))
    return min(tries, key=lambda pair: pair[1])


def _timed(agent: Agent, cell: Cell, seed: int) -> tuple[float, float]:
    prompts = _prompts(cell.texts, cell.length, seed)
    began, busy, used, own = time.perf_counter(), busy_seconds(), agent.cpu_seconds(), time.process_time()
    answer = agent.ask("decode" if cell.tokens else "prefill", prompts, cell.tokens)
    wall = time.perf_counter() - began
    spare = busy_seconds() - busy - (agent.cpu_seconds() - used) - (time.process_time() - own)
    return cell.counted / answer["seconds"], max(0.0, spare) / (wall * (os.cpu_count() or 1))


def _prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random tokens, so that nothing can be known from before."""
    chance = np.random.default_rng([seed, count, length])
    return [chance.integers(1, SHAPE["vocab_size"], length).tolist() for _ in range(count)]


def _report(systems: Sequence[System], cells: Sequence[Cell], results: Results) -> dict[str, Any]:
    found = {}
    for system in systems:
        name = system.name
        if name not in results.rates:
            continue
        found[name] = {
            "peer": system.is_peer,
            "megabytes": round(system.megabytes, 1),
            "memory_megabytes": results.memory[name],
            "same_tokens": results.same.get(name),
            "tokens_per_second": {cell.name: round(results.median(name, cell) or 0.0, 1) for cell in cells},
            "rounds": {each: [round(rate, 1) for rate in rates] for each, rates in results.rates[name].items()},
            "others": {each: round(max(shares), 3) for each, shares in results.others[name].items()},
        }
    return {"systems": found, "failed": results.failed}


def _print(console: Console, systems: Sequence[System], cells: Sequence[Cell], results: Results) -> None:
    table = Table("tokens/s (x best peer)")
    for name in (*(cell.name for cell in cells), "file MB", "resident MB", "same tokens", "others"):
        table.add_column(name, justify="right")
    best = {cell.name: _best_peer(systems, cell, results) for cell in cells}
    for system in systems:
        name = system.name
        if name not in results.rates:
            continue
        row = []
        for cell in cells:
            rate, peer = results.median(name, cell) or 0.0, best[cell.name]
            row.append(f"{rate:.0f} ({rate / peer:.2f})" if peer else f"{rate:.0f}")
        worst = max(share for shares in results.others[name].values() for share in shares)
        same = results.same.get(name)
        row += [f"{system.megabytes:.0f}", f"{results.memory[name]:.0f}", "" if same is None else f"{same:.0%}"]
        table.add_row(name, *row, f"{worst:.0%}")
    console.print(table)
    if any(share > WARN_OTHERS for rows in results.others.values() for shares in rows.values() for share in shares):
        console.print(f"WARNING: something else took over {WARN_OTHERS:.0%} of the machine in some figures (others)")
    for name, reason in results.failed.items():
        console.print(f"failed: {name}: {reason}", markup=False)


def _best_peer(systems: Sequence[System], cell: Cell, results: Results) -> float | None:
    rates = [results.median(system.name, cell) for system in systems if system.is_peer]
    return max((rate for rate in rates if rate is not None), default=None)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
