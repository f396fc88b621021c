"""The operating points of a family over texts: processor time of a row, and answers that differ from the original's.

    python -m benchmarks.operating_points FAMILY [--data TEXTS.jsonl.gz] [--rows 3434] [--threads 1]

One process answers the texts through fp32 ONNX and through every point, chunk by chunk in turn, so that what else the
machine does disturbs all alike. Texts default to the bundled `test` split, which nothing was tuned on. Prints a table,
then one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from fettle.answers import disagreements
from fettle.family import Family
from fettle.points import whole
from fettle.tokenizer import Tokenizer
from optimize.hardware import describe
from optimize.measure import try_points
from optimize.recipes import ONNX_REFERENCE

TEXTS = Path(__file__).parents[1] / "examples" / "data" / "debian-sections.test.jsonl.gz"


def read_texts(path: Path, count: int) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(count), lines, strict=False)]


def compare(family: Family, texts: list[str], threads: int) -> dict[str, dict[str, float]]:
    """By contestant: `cpu_ms` of a row, `cost` as a share of fp32 ONNX, `changed` answers and the certified `bound`."""
    rows = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode(texts)
    points = {point.id: point for point in family.manifest.points}
    ways = {ONNX_REFERENCE: whole(family.variant(ONNX_REFERENCE)), **{name: p.steps for name, p in points.items()}}
    paths = {name: family.variant_path(name) for name in family.variants}
    cpu_ms, arrays = try_points(ways, paths, rows, family.manifest.task, threads, lambda _: None)
    values = {name: arrays[f"{name}.values"] for name in ways}
    reference = values[ONNX_REFERENCE]
    return {
        name: {
            "cpu_ms": cpu_ms[name],
            "cost": cpu_ms[name] / cpu_ms[ONNX_REFERENCE],
            "changed": float(disagreements(found, reference, family.manifest.task).mean()),
            "level": points[name].certificate.alpha if name in points else 0.0,
            "bound": points[name].certificate.upper_bound if name in points else 0.0,
        }
        for name, found in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--data", type=Path, default=TEXTS)
    parser.add_argument("--rows", type=int, default=3434)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    family = Family.open(arguments.family)
    texts = read_texts(arguments.data, arguments.rows)
    figures = compare(family, texts, arguments.threads)
    hardware = describe()
    print(f"{hardware.processor}, {arguments.threads} of {hardware.cores} cores; {len(texts)} texts")
    print(f"{'':16} {'CPU ms/row':>10} {'of fp32':>8} {'changed':>8} {'bound':>8}")
    for name, row in figures.items():
        print(f"{name:16} {row['cpu_ms']:10.2f} {row['cost']:8.1%} {row['changed']:8.2%} {row['bound']:8.2%}")
    setting = {"texts": len(texts), "threads": arguments.threads}
    print(json.dumps({"hardware": hardware.model_dump(), "setting": setting, "points": figures}))


if __name__ == "__main__":
    main()
