"""int8 recipes on one classifier, one thread: cost, disagreement with float32, and dependence on the batch.

    python -m benchmarks.int8_recipes MODEL [--texts 1000] [--timed 256] [--rounds 3] [--calibration 256]

Each recipe through `workers.onnx_encoder.OnnxEncoder` in batches of 32 unsorted validation texts. Figures: CPU seconds
of this process for 1,000 texts (the best of interleaved rounds); the share of rows answered otherwise than by float32
ONNX; the share whose answer changes when they are answered alone, and how far a logit moves then. Prints a table, then
one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from fettle.answers import Floats, disagreements
from fettle.manifest import Precision, Runtime, VariantManifest
from fettle.rows import Row, Rows
from fettle.tokenizer import Tokenizer
from optimize.export import export_onnx
from optimize.fuse import fuse
from optimize.hardware import describe
from optimize.load import Reference, load_reference
from optimize.quantize import quantize_dynamic_int8
from optimize.quantize_rows import quantize_rows_int8
from optimize.quantize_static import quantize_static_int8
from optimize.quantize_weights import quantize_embeddings_int8, quantize_weights
from workers.engine import EngineOptions
from workers.onnx_encoder import MODEL_FILE, OnnxEncoder

DATA = Path(__file__).parents[1] / "examples" / "data"
BATCH = 32
FLOAT = "float32"


def recipes(reference: Reference, calibration: Rows, folder: Path) -> dict[str, Callable[[Path, Path], object]]:
    """How each graph is made from the fused float32 one."""
    spec = reference.tokenizer

    def small(source: Path, path: Path) -> None:
        quantize_rows_int8(source, folder / "large.onnx", calibration, spec)
        quantize_embeddings_int8(folder / "large.onnx", path)

    return {
        "dynamic": quantize_dynamic_int8,
        "dynamic, one row a call": quantize_dynamic_int8,
        "static, extremes": lambda a, b: quantize_static_int8(
            a, b, calibration, spec, method="minmax", equalise=False, left_share=0
        ),
        "static, 99.99th percentile": lambda a, b: quantize_static_int8(
            a, b, calibration, spec, method="percentile", equalise=False, left_share=0
        ),
        "static, equalised": lambda a, b: quantize_static_int8(a, b, calibration, spec, left_share=0),
        "static, equalised, 10 % float": lambda a, b: quantize_static_int8(a, b, calibration, spec),
        "weights 8 bits": lambda a, b: quantize_weights(a, b, bits=8),
        "rows, no calibration": quantize_rows_int8,
        "rows, nearest rounding": lambda a, b: quantize_rows_int8(a, b, calibration, spec, feedback=False),
        "rows": lambda a, b: quantize_rows_int8(a, b, calibration, spec),
        "rows, int8 embeddings": small,
    }


def read_rows(reference: Reference, folder: Path, split: str, count: int) -> list[Row]:
    path = folder / "tokenizer.json"
    path.write_bytes(reference.tokenizer_json)
    with gzip.open(DATA / f"debian-sections.{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    chosen = np.random.default_rng(0).permutation(len(texts))[:count]
    return Tokenizer(path, reference.tokenizer).encode([texts[index] for index in chosen])


def opened(directory: Path, reference: Reference, *, row_by_row: bool) -> OnnxEncoder:
    manifest = VariantManifest(
        id="bench", runtime=Runtime.ONNX, precision=Precision.INT8, recipe=[], tokenizer=reference.tokenizer,
        task=reference.task, files=[], row_by_row=row_by_row,
    )  # fmt: skip
    return OnnxEncoder(directory, manifest, EngineOptions())


def answers(engine: OnnxEncoder, rows: list[Row], batch: int) -> Floats:
    parts = [Rows.of(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    return np.concatenate([engine.run(part).values for part in parts])


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    reference = load_reference(arguments.model)
    rows = read_rows(reference, folder, "validation", arguments.texts)
    calibration = Rows.of(read_rows(reference, folder, "train", arguments.calibration))
    made = recipes(reference, calibration, folder)
    for index in range(len(made) + 1):
        (folder / str(index)).mkdir()
    source = folder / "0" / MODEL_FILE
    export_onnx(reference, folder / "plain.onnx", Rows.of(rows[:8]))
    fuse(folder / "plain.onnx", source, Rows.of(rows[:8]), reference.tokenizer)
    engines = {FLOAT: opened(source.parent, reference, row_by_row=False)}
    figures: dict[str, dict[str, float]] = {FLOAT: {"build_cpu_seconds": 0.0}}
    for index, (name, make) in enumerate(made.items(), 1):
        started = time.process_time()
        make(source, folder / str(index) / MODEL_FILE)
        figures[name] = {"build_cpu_seconds": round(time.process_time() - started, 1)}
        engines[name] = opened(folder / str(index), reference, row_by_row=name.endswith("a call"))
    truth = answers(engines[FLOAT], rows, BATCH)
    for index, (name, engine) in enumerate(engines.items()):
        together, single = answers(engine, rows, BATCH), answers(engine, rows[: arguments.timed], 1)
        changed = together[: len(single)].argmax(axis=1) != single.argmax(axis=1)
        figures[name] |= {
            "disagreement_percent": round(100 * float(disagreements(together, truth, reference.task).mean()), 2),
            "mean_difference": round(float(np.abs(together - truth).mean()), 4),
            "alone_changed_percent": round(100 * float(changed.mean()), 2),
            "alone_max_difference": round(float(np.abs(together[: len(single)] - single).max()), 6),
            "megabytes": round((folder / str(index) / MODEL_FILE).stat().st_size / 1e6, 1),
        }
    for name, seconds in timed(engines, rows[: arguments.timed], arguments.rounds).items():
        figures[name]["cpu_seconds_per_1000"] = round(seconds / min(arguments.timed, len(rows)) * 1000, 2)
    return figures


def timed(engines: dict[str, OnnxEncoder], rows: list[Row], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(engines, float("inf"))
    for _ in range(rounds):
        for name, engine in engines.items():
            started = time.process_time()
            answers(engine, rows, BATCH)
            best[name] = min(best[name], time.process_time() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a classifier of the Debian sections, as `examples.finetune` makes one")
    parser.add_argument("--texts", type=int, default=1000, help="validation texts that the answers are compared on")
    parser.add_argument("--timed", type=int, default=256, help="of these, how many are timed and answered alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=256, help="training texts that ranges are taken from")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = compare(arguments, Path(name))
    print(f"\n{'recipe':31} {'CPU s/1,000':>11} {'differs':>8} {'alone':>7} {'moves':>8} {'MB':>6} {'build s':>8}")
    for name, row in figures.items():
        print(
            f"{name:31} {row['cpu_seconds_per_1000']:11.2f} {row['disagreement_percent']:7.2f}% "
            f"{row['alone_changed_percent']:6.2f}% {row['alone_max_difference']:8.4f} {row['megabytes']:6.1f} "
            f"{row['build_cpu_seconds']:8.1f}"
        )
    setting = {**vars(arguments), "model": Path(arguments.model).name, "batch": BATCH}
    print(json.dumps({"hardware": describe().model_dump(), "setting": setting, "recipes": figures}))


if __name__ == "__main__":
    print(f"ONNX Runtime {onnxruntime.__version__}")
    main()
