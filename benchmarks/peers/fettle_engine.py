"""Fettle's own engine as the benchmark drives the others: its step loop over one variant's graph.

python -m benchmarks.peers.fettle_engine --variant DIR --threads 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.peers.agent import Clock, Prompts, serve
from fettle.generation import GREEDY, Prompt
from workers.engine import EngineOptions, open_runner
from workers.generator import Generator

MEMORY_BYTES = 2 << 30


class FettleEngine:
    def __init__(self, variant: Path, threads: int) -> None:
        runner = open_runner(variant, EngineOptions(threads=threads, verify=False))
        runner.warm_up()
        self._generator = Generator(runner, MEMORY_BYTES, max_slots=64)
        self._asked = 0

    def greedy(self, prompts: Prompts, tokens: int) -> Prompts:
        names = [self._ask(prompt, tokens) for prompt in prompts]
        found: dict[str, list[int]] = {name: [] for name in names}
        while self._generator.busy:
            for step in self._generator.step():
                if step.error is not None:
                    raise step.error
                found[step.id] += [token.id for token in step.tokens]
        return [found[name] for name in names]

    def prefill(self, prompt: list[int], clock: Clock) -> None:
        self._ask(prompt, 1)
        with clock:
            while self._generator.busy:
                self._generator.step()

    def decode(self, prompts: Prompts, tokens: int, clock: Clock) -> None:
        # Prompts are fed one after the other, and those that came first take a token at every step.
        names = [self._ask(prompt, 2 * tokens + 8 * len(prompts)) for prompt in prompts]
        begun: set[str] = set()
        while len(begun) < len(prompts):
            begun.update(step.id for step in self._generator.step())
        with clock:
            for _ in range(tokens):
                self._generator.step()
        for name in names:
            self._generator.cancel(name)

    def _ask(self, prompt: list[int], tokens: int) -> str:
        self._asked += 1
        name = str(self._asked)
        self._generator.submit(Prompt(name, np.array(prompt, np.int32), tokens, GREEDY))
        return name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variant", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    serve(lambda: FettleEngine(options.variant, options.threads))


if __name__ == "__main__":
    main()
