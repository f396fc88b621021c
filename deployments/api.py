"""The HTTP API: one function a path, from a request body over the router to a reply in its standard's shape."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from tokenizers import Encoding

from deployments import border, schemas
from deployments.border import ERRORS, Api, BodyReader, reply
from deployments.router import Inferred, Router, ServedFamily, Target, Tokenized
from fettle import __version__
from fettle.answers import normalized, probabilities, truncated_vectors
from fettle.errors import RequestError, UnavailableError
from fettle.manifest import Head, TaskKind
from fettle.tokenizer import Text

DESCRIPTION = "Measured variants of transformer encoders, in the request shapes of OpenAI, vLLM and TEI."

Responses = dict[int | str, dict[str, Any]]
# Path, handler, and what a good reply holds.
Route = tuple[str, Callable[..., Awaitable[Response]], Any]


def build_api(router: Router, api_keys: Sequence[str] = ()) -> Api:
    """The ASGI application around a router."""
    endpoints = Endpoints(router)
    direct = {path: handler for path, handler, _ in endpoints.inference}
    app = Api(direct, api_keys, title="Fettle", version=__version__, description=DESCRIPTION)
    endpoints.add_to(app)
    border.install_error_handlers(app)
    border.document(app, endpoints.readers)
    return app


@dataclass(frozen=True, slots=True)
class Answer:
    """What every inference endpoint builds its reply from."""

    target: Target
    tokenized: Tokenized
    inferred: Inferred

    @property
    def model(self) -> str:
        return f"{self.target.family.name}:{self.target.variant}"

    @property
    def served(self) -> dict[str, Any]:
        return {
            "family": self.target.family.name,
            "variant": self.target.variant,
            "truncated": self.tokenized.truncated,
            "tokenize_ms": round(self.tokenized.ms, 3),
            "queue_ms": round(self.inferred.queue_ms, 3),
            "infer_ms": round(self.inferred.infer_ms, 3),
        }

    @property
    def headers(self) -> dict[str, str]:
        return {f"x-fettle-{name.replace('_', '-')}": str(value) for name, value in self.served.items()}

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.tokenized.tokens, "total_tokens": self.tokenized.tokens}


class Endpoints:
    """The paths, bound to one router."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._started = int(time.time())
        models = {
            "/v1/embeddings": schemas.EmbeddingsRequest,
            "/classify": schemas.ClassifyRequest,
            "/embed": schemas.EmbedRequest,
            "/predict": schemas.PredictRequest,
            "/tokenize": schemas.TokenizeRequest,
        }
        limit = router.limits.max_body_bytes
        self.readers: dict[str, BodyReader[Any]] = {path: BodyReader(model, limit) for path, model in models.items()}

    @property
    def inference(self) -> list[Route]:
        scores = list[schemas.Score]
        return [
            ("/v1/embeddings", self.embeddings, schemas.EmbeddingsReply),
            ("/classify", self.classify, schemas.ClassifyReply),
            ("/embed", self.embed, list[list[float]]),
            ("/predict", self.predict, scores | list[scores]),
            ("/tokenize", self.tokenize, schemas.TokenizeReply | list[list[schemas.TeiToken]]),
        ]

    @property
    def reading(self) -> list[Route]:
        return [
            ("/v1/models", self.models, schemas.ModelList),
            ("/info", self.info, schemas.Info),
            ("/health", self.health, schemas.State),
            ("/ready", self.ready, schemas.State),
        ]

    def add_to(self, app: FastAPI) -> None:
        """Register every path, with what it may answer."""
        for path, handler, model in self.inference:
            app.add_api_route(
                path, handler, methods=["POST"], responses=ERRORS | {200: {"model": model}}, response_class=Response
            )
        for path, handler, model in self.reading:
            failures: Responses = {code: ERRORS[code] for code in ((401, 503) if path == "/ready" else (401,))}
            app.add_api_route(
                path, handler, methods=["GET"], responses=failures | {200: {"model": model}}, response_class=Response
            )

    async def embeddings(self, request: Request) -> Response:
        """Embeddings as the OpenAI API documents them."""
        body: schemas.EmbeddingsRequest = await self.readers["/v1/embeddings"](request)
        target = self._router.target(body.model, TaskKind.EMBED)
        _check_dimensions(target, body.dimensions)
        answer = await self._answer(target, body.input, max_length=_limit(body.truncate_prompt_tokens))
        vectors = truncated_vectors(answer.inferred.values, body.dimensions)
        encode = _as_base64 if body.encoding_format == "base64" else _as_floats
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ]
        content = {
            "object": "list",
            "data": data,
            "model": answer.model,
            "usage": answer.usage,
            "fettle": answer.served,
        }
        return reply(content, answer.headers)

    async def classify(self, request: Request) -> Response:
        """Classification as vLLM documents it."""
        body: schemas.ClassifyRequest = await self.readers["/classify"](request)
        target = self._router.target(body.model, TaskKind.CLASSIFY)
        answer = await self._answer(target, body.input, max_length=_limit(body.truncate_prompt_tokens))
        labels = _labels(target)
        scores = probabilities(answer.inferred.values, target.manifest.task)
        data = [
            {"index": index, "label": labels[int(row.argmax())], "probs": row, "num_classes": len(labels)}
            for index, row in enumerate(scores)
        ]
        content = {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": answer.model,
            "data": data,
            "usage": answer.usage,
            "fettle": answer.served,
        }
        return reply(content, answer.headers)

    async def embed(self, request: Request) -> Response:
        """Embeddings as TEI documents them: a list of vectors."""
        body: schemas.EmbedRequest = await self.readers["/embed"](request)
        target = self._router.target(body.model, TaskKind.EMBED)
        _check_dimensions(target, body.dimensions)
        if not body.normalize and target.manifest.task.normalized:
            raise RequestError(
                "normalize: this model's vectors are normalised by the model itself; leave it true", param="normalize"
            )
        answer = await self._answer(target, body.inputs, truncate=body.truncate is not False)
        vectors = truncated_vectors(answer.inferred.values, body.dimensions)
        return reply(normalized(vectors) if body.normalize else vectors, answer.headers)

    async def predict(self, request: Request) -> Response:
        """Classification as TEI documents it: scores of all labels, the highest first; pairs allowed."""
        body: schemas.PredictRequest = await self.readers["/predict"](request)
        target = self._router.target(body.model, TaskKind.CLASSIFY)
        texts, single = _pairs(body.inputs)
        answer = await self._answer(target, texts, truncate=body.truncate is not False)
        values = answer.inferred.values
        scores = values if body.raw_scores else probabilities(values, target.manifest.task)
        labels = _labels(target)
        ranked = [[{"score": row[i], "label": labels[i]} for i in np.argsort(-row, kind="stable")] for row in scores]
        return reply(ranked[0] if single else ranked, answer.headers)

    async def tokenize(self, request: Request) -> Response:
        """Token ids, in vLLM's shape for `prompt` and in TEI's for `inputs`."""
        body: schemas.VllmTokenizeRequest | schemas.TeiTokenizeRequest = await self.readers["/tokenize"](request)
        family = self._router.target(body.model).family
        if isinstance(body, schemas.VllmTokenizeRequest):
            return reply(await asyncio.to_thread(_vllm_tokens, family, body))
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        self._router.check_inputs(len(texts))
        return reply(await asyncio.to_thread(_tei_tokens, family, texts, special=body.add_special_tokens))

    async def models(self) -> Response:
        """Every family, and every variant as `family:variant`, which pins it."""
        names = [model for family in self._router.families.values() for model in family.models]
        cards = [{"id": name, "object": "model", "created": self._started, "owned_by": "fettle"} for name in names]
        return reply({"object": "list", "data": cards})

    async def info(self) -> Response:
        """What is served, with the measured figures, and the queues of this router."""
        families = [_family_info(family) for family in self._router.families.values()]
        return reply({"version": __version__, "families": families})

    async def health(self) -> Response:
        """Live: this router answers."""
        return reply({"status": "ok"})

    async def ready(self) -> Response:
        """Ready: every family's default variant has a replica that takes work."""
        for family in self._router.families.values():
            if not family.batchers[family.default].is_ready:
                raise UnavailableError(f"{family.name}:{family.default} has no replica that takes work yet")
        return reply({"status": "ok"})

    async def _answer(
        self, target: Target, inputs: Any, *, max_length: int | None = None, truncate: bool = True
    ) -> Answer:
        """`inputs` is a text, texts, pairs, token ids, or lists of them."""
        texts, ids = _texts_or_ids(inputs)
        self._router.check_room(target, len(texts or ids))
        if texts:
            tokenized = await self._router.tokenize(target, texts, max_length=max_length, truncate=truncate)
        else:
            tokenized = self._router.rows_of_ids(target, ids, max_length=max_length, truncate=truncate)
        return Answer(target, tokenized, await self._router.infer(target, tokenized.rows))


def _texts_or_ids(inputs: Any) -> tuple[list[Text], list[list[int]]]:
    """One of the two lists is empty. The schema has already made sure of the shape."""
    if isinstance(inputs, str):
        return [inputs], []
    if isinstance(inputs[0], int):
        return [], [inputs]
    return ([], inputs) if isinstance(inputs[0], list) else (inputs, [])


def _pairs(inputs: str | list[str] | list[list[str]]) -> tuple[list[Text], bool]:
    """TEI's nesting: a list of strings is one text or one pair, a list of lists is a batch of them."""
    if isinstance(inputs, str):
        return [inputs], True
    if isinstance(inputs[0], str):
        return [_text(inputs)], True
    return [_text(item) for item in inputs], False


def _text(item: list[str]) -> Text:
    return item[0] if len(item) == 1 else (item[0], item[1])


def _limit(truncate_prompt_tokens: int | None) -> int | None:
    if truncate_prompt_tokens in (None, -1):
        return None
    if truncate_prompt_tokens is not None and truncate_prompt_tokens < 2:
        raise RequestError("truncate_prompt_tokens: must be -1 or at least 2", param="truncate_prompt_tokens")
    return truncate_prompt_tokens


def _check_dimensions(target: Target, dimensions: int | None) -> None:
    width = target.manifest.task.width
    if dimensions is not None and dimensions > width:
        raise RequestError(f"dimensions: {dimensions} asked, the model has {width}", param="dimensions")


def _labels(target: Target) -> list[str]:
    task = target.manifest.task
    return task.labels if task.head is not Head.REGRESSION or task.labels else ["score"]


def _as_floats(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(vector)


def _as_base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").data).decode()


def _vllm_tokens(family: ServedFamily, body: schemas.VllmTokenizeRequest) -> dict[str, Any]:
    encoding = family.tokenizer.pieces(body.prompt, special=body.add_special_tokens)
    return {
        "count": len(encoding.ids),
        "max_model_len": family.tokenizer.spec.max_length,
        "tokens": encoding.ids,
        "token_strs": encoding.tokens if body.return_token_strs else None,
    }


def _tei_tokens(family: ServedFamily, texts: Sequence[str], *, special: bool) -> list[list[dict[str, Any]]]:
    return [_tei_pieces(family.tokenizer.pieces(text, special=special)) for text in texts]


def _tei_pieces(encoding: Encoding) -> list[dict[str, Any]]:
    return [
        {
            "id": token,
            "text": piece,
            "special": bool(mask),
            "start": None if mask else start,
            "stop": None if mask else stop,
        }
        for token, piece, mask, (start, stop) in zip(
            encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
        )
    ]


def _family_info(served: ServedFamily) -> dict[str, Any]:
    manifest = served.family.manifest
    return {
        "name": served.name,
        "task": manifest.task.kind,
        "max_length": manifest.tokenizer.max_length,
        "width": manifest.task.width,
        "labels": manifest.task.labels,
        "variants": [_variant_info(Target(served, name)) for name in served.batchers],
    }


def _variant_info(target: Target) -> dict[str, Any]:
    manifest, measured, stats = target.manifest, target.manifest.measured, target.batcher.stats
    return {
        "id": manifest.id,
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "default": manifest.id == target.family.default,
        "size_bytes": manifest.size_bytes,
        "disagreement": measured.quality.disagreement if measured else None,
        "batch_invariant": measured.batching.invariant if measured else None,
        "queued": target.batcher.depth,
        "backlog_s": round(target.batcher.backlog_s, 3),
        "rows": stats.rows,
        "batches": stats.batches,
        "refused": stats.refused,
        "withdrawn": stats.withdrawn,
        "retried": stats.retried,
    }
