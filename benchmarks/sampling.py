"""What the sampler costs: microseconds a row, by vocabulary, batch and what is asked for.

    python -m benchmarks.sampling [--rounds 5]

The logits fall with the logarithm of a token's rank, as a language model's do, with an entropy of about 3 nats; `flat`
ones are normal with a standard deviation of 1, where top_p keeps tens of thousands of tokens: as bad as it gets. One
thread, the best of the rounds. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from benchmarks.machine import describe_machine, machine_lines
from fettle.generation import Prompt, Sampling
from fettle.sampling import Draw, Floats, Sampler

VOCABULARIES = (6_144, 49_152, 151_936)
BATCHES = (1, 8, 32)
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
CASES = {
    "greedy": (Sampling(temperature=0.0), "language"),
    "greedy, penalties": (Sampling(temperature=0.0, **PENALTIES), "language"),
    "temperature": (Sampling(temperature=0.8), "language"),
    "temperature, top_p": (Sampling(temperature=0.8, top_p=0.95), "language"),
    "temperature, top_k, top_p": (Sampling(temperature=0.8, top_k=50, top_p=0.95), "language"),
    "temperature, min_p": (Sampling(temperature=0.8, min_p=0.05), "language"),
    "temperature, top_p, penalties": (Sampling(temperature=0.8, top_p=0.95, **PENALTIES), "language"),
    "temperature, top_p, 5 logprobs": (Sampling(temperature=0.8, top_p=0.95, logprobs=5), "language"),
    "temperature, top_p, flat": (Sampling(temperature=1.0, top_p=0.95), "flat"),
}
PROMPT, GENERATED = 256, 128
ENTROPY = 3.0


def language_logits(rng: np.random.Generator, rows: int, vocabulary: int) -> Floats:
    """Token of rank r: -slope * log(r), the slope such that the entropy is `ENTROPY`, in an order of its own a row."""
    ranks = np.log(np.arange(1, vocabulary + 1))
    low, high = 1.0, 4.0
    for _ in range(40):
        slope = (low + high) / 2
        shares = np.exp(-slope * ranks)
        shares /= shares.sum()
        low, high = (slope, high) if -(shares * np.log(shares)).sum() > ENTROPY else (low, slope)
    return np.stack([rng.permutation(-slope * ranks) for _ in range(rows)]).astype(np.float32)


def microseconds_per_row(step: Callable[[], object], rows: int, rounds: int) -> float:
    step()
    repeats = max(2, 64 // rows)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(repeats):
            step()
        best = min(best, (time.perf_counter() - started) / repeats)
    return best / rows * 1e6


def draws_for(sampling: Sampling, rng: np.random.Generator, rows: int, vocabulary: int) -> list[Draw]:
    """Generations that are under way."""
    draws = []
    for row in range(rows):
        ids = rng.integers(vocabulary, size=PROMPT, dtype=np.int32)
        draw = Draw(Prompt(id=str(row), ids=ids, max_tokens=1024, sampling=sampling, choice=row), vocabulary)
        for token in rng.integers(vocabulary, size=GENERATED).tolist():
            draw.take(token)
        draws.append(draw)
    return draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    machine = describe_machine()
    print("\n".join(machine_lines(machine)))
    print(f"\n{'microseconds a row':32} {'vocabulary':>10}" + "".join(f"{f'batch {batch}':>10}" for batch in BATCHES))
    results = []
    for name, (sampling, shape) in CASES.items():
        for vocabulary in VOCABULARIES:
            rng = np.random.default_rng(0)
            rows = max(BATCHES)
            logits = (
                language_logits(rng, rows, vocabulary)
                if shape == "language"
                else rng.standard_normal((rows, vocabulary), np.float32)
            )
            sampler, draws = Sampler(vocabulary), draws_for(sampling, rng, rows, vocabulary)
            figures = {}
            for batch in BATCHES:
                step = lambda: sampler.sample(logits[:batch], draws[:batch])  # noqa: B023, E731
                figures[batch] = round(microseconds_per_row(step, batch, arguments.rounds), 1)
            print(f"{name:32} {vocabulary:10,}" + "".join(f"{figures[batch]:10.1f}" for batch in BATCHES))
            results.append({"case": name, "vocabulary": vocabulary, "microseconds_per_row": figures})
    print(json.dumps({"machine": machine, "setting": vars(arguments), "results": results}))


if __name__ == "__main__":
    main()
