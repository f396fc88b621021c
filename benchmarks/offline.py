"""The limit beside the measurement: what the bare engine does with the same texts, without any server.

Texts are tokenized beforehand and sorted by length, so that padding costs nothing; the cores are used as one
process with all threads and as one single-threaded process each; several batch sizes are tried on a part of the
texts and the best layout runs over all of them. No server can do better with that engine, short of merging texts.

    python -m benchmarks.offline FAMILY VARIANT
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Barrier

from fettle.bench.load import TEXTS
from fettle.bench.texts import read_texts, shuffled
from fettle.family import Family
from fettle.machine import usable_cores
from fettle.rows import Row, Rows, in_batches
from fettle.tokenizer import Tokenizer
from workers.engine import Engine, EngineOptions, open_engine

BATCHES = (4, 8, 16, 32, 64)
ANY_TOKENS = 1 << 30  # batches are bounded by their rows alone


@dataclass(frozen=True, slots=True)
class Offline:
    """`cpu_s` is CPU seconds a row; `processes` x `threads` and `batch` are the best that were found."""

    rows_per_second: float
    cpu_s: float
    processes: int
    threads: int
    batch: int
    rows: int


def offline_limit(family: Path, variant: str, texts: Sequence[str], cores: int, pilot: int = 256) -> Offline:
    """The best layout on the first `pilot` texts, measured on all of them."""
    opened = Family.open(family)
    rows = Tokenizer(opened.tokenizer_path, opened.manifest.tokenizer).encode(list(texts))
    directory = opened.variant_path(variant)
    best: Offline | None = None
    for processes, threads in sorted({(cores, 1), (1, cores)}):
        with _Engines(directory, processes, threads) as engines:
            # A larger batch would leave some process without one.
            for batch in [size for size in BATCHES if size * processes <= len(rows[:pilot])]:
                tried = engines.measure(rows[:pilot], batch)
                best = tried if best is None or tried.rows_per_second > best.rows_per_second else best
    if best is None:
        raise ValueError(f"{len(rows)} texts are too few for {cores} cores")
    with _Engines(directory, best.processes, best.threads) as engines:
        return engines.measure(rows, best.batch)


class _Engines:
    """Processes with one engine each, that start every measurement together."""

    def __init__(self, directory: Path, processes: int, threads: int) -> None:
        self._shape = (processes, threads)
        spawn = multiprocessing.get_context("spawn")
        start = (directory, threads, spawn.Barrier(processes))
        self._pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_open, initargs=start)

    def __enter__(self) -> _Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def measure(self, rows: Sequence[Row], batch: int) -> Offline:
        processes, threads = self._shape
        lengths = [len(row) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        batches = [Rows.of([rows[i] for i in chosen]) for chosen in in_batches(order, lengths, batch, ANY_TOKENS)]
        # Every process gets short and long batches, in no order that a cache or a clock could profit from.
        random.Random(0).shuffle(batches)
        shares = [batches[share::processes] for share in range(processes)]
        spent = list(self._pool.map(_run, shares))
        began, ended = min(began for began, _, _ in spent), max(ended for _, ended, _ in spent)
        cpu = sum(cpu for _, _, cpu in spent)
        return Offline(len(rows) / (ended - began), cpu / len(rows), processes, threads, batch, len(rows))


# One engine a process: a pool hands its tasks no other way to the state that its initializer made.
_engine: Engine
_barrier: Barrier


def _open(directory: Path, threads: int, barrier: Barrier) -> None:
    global _engine, _barrier
    _engine, _barrier = open_engine(directory, EngineOptions(threads=threads)), barrier
    _engine.warm_up()


def _run(batches: list[Rows]) -> tuple[float, float, float]:
    """When it began and ended, on a clock that all processes share, and the CPU seconds between."""
    _engine.run(batches[0])
    _barrier.wait(timeout=120)  # another process may have failed; do not wait for it for ever
    began, cpu = time.monotonic(), time.process_time()
    for batch in batches:
        _engine.run(batch)
    return began, time.monotonic(), time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("variant")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--rows", type=int, default=1024, help="texts to run over")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts = shuffled(read_texts(options.texts), options.seed)[: options.rows]
    print(json.dumps(asdict(offline_limit(options.family, options.variant, texts, usable_cores()))))


if __name__ == "__main__":
    main()
