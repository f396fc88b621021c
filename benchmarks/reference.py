"""What the vectors ought to be: transformers in fp32, mean-pooled and normalized; and how far a server's are off."""

from __future__ import annotations

import json
import multiprocessing
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fettle.bench.traffic import payload, read_answer

# int8 moves a vector of this model by about 0.01; wrong pooling, or the wrong model, by far more.
LOWEST_COSINE = 0.97

Vectors = NDArray[np.float32]


def reference_vectors(model: Path, texts: Sequence[str]) -> Vectors:
    """float32 [texts, width], unit length; computed in a process that ends, so that no torch pool stays behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_embed, model, list(texts)).result()


def lowest_cosine(url: str, model: str, texts: Sequence[str], reference: Vectors) -> float:
    """The worst cosine between what the server answers and the reference, one text a request.

    Raises:
        ValueError: a reply without a usable vector, or a cosine below `LOWEST_COSINE`.
    """
    served = np.array([_ask(url, model, text) for text in texts])
    served /= np.linalg.norm(served, axis=1, keepdims=True)
    lowest = float((served * reference).sum(axis=1).min())
    if lowest < LOWEST_COSINE:
        raise ValueError(f"wrong vectors: the lowest cosine to the fp32 reference is {lowest:.3f}")
    return lowest


def _ask(url: str, model: str, text: str) -> list[float]:
    body = json.dumps(payload("openai", model, text)).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return read_answer("openai", reply.read())


def _embed(model: Path, texts: list[str]) -> Vectors:
    import torch
    from transformers import AutoModel, AutoTokenizer

    batch = AutoTokenizer.from_pretrained(model)(
        texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(model, dtype=torch.float32).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors: Vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return vectors
