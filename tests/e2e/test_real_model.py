"""The main job on a real encoder: fine-tuned, optimized by the command, served on Ray, asked over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from examples.demo import offline
from examples.finetune import Recipe, finetune, read_rows
from fettle.answers import Floats, probabilities
from fettle.config import FamilyConfig, ReplicaConfig, ServeConfig
from fettle.family import Family
from fettle.manifest import Runtime
from fettle.tokenizer import Tokenizer
from tests.integration.service import Service, service

pytestmark = pytest.mark.slow

TEXTS = 120
VARIANTS = ["onnx-fp32", "onnx-int8-dynamic"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"] for row in read_rows("test")[:TEXTS]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Family:
    where = tmp_path_factory.mktemp("real")
    finetune(where / "model", Recipe(rows=64), lambda done, loss: None)
    data = where / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, "-m", "fettle.cli", "optimize", str(where / "model"), "--test", str(data)]
    command += ["--out", str(where / "family"), "--name", "sections", "--recipe", VARIANTS[-1]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return Family.open(where / "family")


@pytest.fixture(scope="module")
def served(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    config = ServeConfig(
        families=[FamilyConfig(path=str(family.directory), variants=VARIANTS)],
        replicas=ReplicaConfig(min_replicas=1, max_replicas=1),
    )
    with service(config, tmp_path_factory.mktemp("real-service") / "log") as running:
        yield running


def ask_all(served: Service, variant: str, texts: list[str]) -> Floats:
    """All texts at once, one request each, so that they share batches: scores float32 [texts, labels]."""
    with httpx.Client(base_url=served.url, timeout=60) as client, ThreadPoolExecutor(16) as clients:

        def ask(text: str) -> list[float]:
            reply = client.post("/classify", json={"model": f"sections:{variant}", "input": text})
            assert reply.status_code == 200, reply.text
            return reply.json()["data"][0]["probs"]

        return np.array(list(clients.map(ask, texts)), np.float32)


def test_the_family_is_intact_and_measured(family: Family):
    assert family.verify() == []
    # What it is made from comes along.
    assert set(family.variants) == {"torch-fp32", "onnx-fp32-trim", *VARIANTS}
    for variant in family.variants.values():
        assert variant.measured is not None
        assert variant.measured.quality.rows == TEXTS
    assert family.variants["torch-fp32"].runtime is Runtime.TORCH
    assert family.variants["onnx-fp32"].measured.quality.disagreement == 0
    assert family.manifest.default in {"torch-fp32", "onnx-fp32", "onnx-fp32-trim"}
    assert family.variants["onnx-int8-dynamic"].size_bytes < 0.8 * family.variants["onnx-fp32"].size_bytes


@pytest.mark.parametrize(("variant", "tolerance"), [("onnx-fp32", 1e-5), ("onnx-int8-dynamic", 0.05)])
def test_what_is_served_is_what_the_variant_answers_offline(family, served, texts, variant, tolerance):
    """Exactly, rounding apart, for fp32; dynamic int8 answers depend on who shares the batch."""
    rows = Tokenizer(family.tokenizer_path, family.manifest.tokenizer).encode(texts)
    expected = probabilities(offline(family, variant, rows), family.manifest.task)
    answers = ask_all(served, variant, texts)
    assert np.abs(answers - expected).max() < tolerance
    if family.variants[variant].measured.batching.invariant:
        assert (answers.argmax(axis=1) == expected.argmax(axis=1)).all()
