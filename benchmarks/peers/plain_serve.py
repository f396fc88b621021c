"""What a Ray user writes in twenty lines: default Serve, `@serve.batch`, transformers in fp32, on two threads.

No fast-path flag of Serve, no ONNX, no int8: the starting point, not a straw man. Batches are as large as Serve's own
guide has them, and the replica takes enough requests at once to fill two of them (Serve's default of 5 could not
fill one).

    python -m benchmarks.peers.plain_serve --model DIR --task embed --port 8000
"""

from __future__ import annotations

import argparse
from typing import Any

import ray
import torch
from ray import serve
from starlette.requests import Request
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 2})
class Embedder:
    def __init__(self, model: str) -> None:
        torch.set_num_threads(2)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModel.from_pretrained(model, dtype=torch.float32).eval()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def embed(self, texts: list[str]) -> list[list[float]]:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).tolist()

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        vector = await self.embed(body["input"])
        data = [{"object": "embedding", "index": 0, "embedding": vector}]
        return {"object": "list", "model": body["model"], "data": data}


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 2})
class Classifier:
    def __init__(self, model: str) -> None:
        torch.set_num_threads(2)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def classify(self, texts: list[str]) -> list[list[float]]:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            return self.model(**batch).logits.softmax(-1).tolist()

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        probs = await self.classify(body["input"])
        label = self.model.config.id2label[max(range(len(probs)), key=probs.__getitem__)]
        data = [{"index": 0, "label": label, "probs": probs, "num_classes": len(probs)}]
        return {"object": "list", "model": body["model"], "data": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="directory or hub id of the encoder")
    parser.add_argument("--task", choices=("embed", "classify"), default="embed")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=2)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    if options.task == "classify":
        serve.run(Classifier.bind(options.model), route_prefix="/classify", blocking=True)
    else:
        serve.run(Embedder.bind(options.model), route_prefix="/v1/embeddings", blocking=True)


if __name__ == "__main__":
    main()
