"""Calibration and test rows of a data set, pooled and dealt anew at random: one draw, with the seed that is given.

    python -m benchmarks.resplit OUT [--data examples/data/debian-sections] [--seed 0]

A certificate is about traffic like the calibration rows, row by row. The bundled splits are by source package, and rows
of one package are alike, so that calibration has 11 % in a section where test has 5: there, a certified level says less
about `test` than about traffic that is split by rows, as `fettle optimize --data` does. This makes such a split without
touching the rows that anything was trained or tuned on. Sizes stay as they are.
"""

from __future__ import annotations

import argparse
import gzip
import random
import sys
from pathlib import Path

DATA = "examples/data/debian-sections"
PARTS = ("calibration", "test")


def main() -> None:
    options = parse(sys.argv[1:])
    parts = {part: read(Path(f"{options.data}.{part}.jsonl.gz")) for part in PARTS}
    rows = [row for part in PARTS for row in parts[part]]
    random.Random(options.seed).shuffle(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = 0
    for part in PARTS:
        end = begin + len(parts[part])
        with gzip.open(options.out / f"{part}.jsonl.gz", "wb") as file:
            file.writelines(rows[begin:end])
        begin = end


def read(path: Path) -> list[bytes]:
    with gzip.open(path, "rb") as file:
        return file.readlines()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resplit", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a directory for calibration.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--data", default=DATA, help="what comes before `.calibration.jsonl.gz`")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
