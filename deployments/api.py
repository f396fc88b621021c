"""The HTTP API: one function a path, from a request body over the router to a reply in its standard's shape."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import Request, Response

from deployments import border, notes, schemas, shapes
from deployments.border import Api, BodyReader, Route, reply
from deployments.conversations import Conversations
from deployments.keyring import Keyring
from deployments.router import Asked, Inferred, Router, Tokenized
from deployments.status import Status
from deployments.text_api import TextEndpoints
from deployments.text_source import TextSource
from deployments.token_api import TokenEndpoints
from deployments.tracing import Tracer
from deployments.walk import Visit
from deployments.wishes import wishes_of
from fettle import __version__
from fettle.answers import Floats, normalized, truncated_vectors
from fettle.errors import RequestError
from fettle.manifest import Task, TaskKind

# What is answered with rows, in one piece.
ROW_PATHS = {
    "/v1/embeddings": schemas.EmbeddingsRequest,
    "/classify": schemas.ClassifyRequest,
    "/embed": schemas.EmbedRequest,
    "/predict": schemas.PredictRequest,
}
# Of what `Served` says, in the order of its fields.
HEADER_NAMES = {
    each.alias or name: f"x-fettle-{(each.alias or name).replace('_', '-')}"
    for name, each in schemas.Served.model_fields.items()
}
DESCRIPTION = "Measured variants of transformers, in the request shapes of OpenAI, vLLM and TEI."


def build_api(
    router: Router,
    keyring: Keyring | None = None,
    text_source: TextSource | None = None,
    proxy_secret: str | None = None,
    tracer: Tracer | None = None,
) -> Api:
    """The ASGI application around a router; without a keyring it is open to all.

    `text_source` generates where a family does so; `proxy_secret`: see `Api`; `tracer` traces a share of the requests.

    Raises:
        FamilyError, ModelError: a family's chat template is none.
    """
    conversations = Conversations(router.families.values())
    groups: list[Endpoints | TokenEndpoints | TextEndpoints] = [
        Endpoints(router),
        TokenEndpoints(router, conversations),
    ]
    if text_source is not None and any(family.task.kind is TaskKind.GENERATE for family in router.families.values()):
        groups.append(TextEndpoints(router, text_source, conversations))
    routes = [route for group in groups for route in group.routes]
    direct = {path: handler for path, handler, _ in routes}
    app = Api(
        direct,
        keyring or Keyring(),
        proxy_secret,
        router.journal,
        tracer,
        title="Fettle",
        version=__version__,
        description=DESCRIPTION,
    )
    border.add_posts(app, routes)
    Status(router).add_to(app)
    border.install_error_handlers(app)
    # Ray looks for each request's route, one after the other.
    app.router.routes.sort(key=lambda route: getattr(route, "path", "") not in direct)
    border.document(app, {path: reader for group in groups for path, reader in group.readers.items()})
    return app


@dataclass(slots=True, eq=False)
class Answer:
    """What every inference endpoint builds its reply from.

    `model`: the variant that answered, or the family where several did; `served`: see `schemas.Served`.
    """

    router: str
    asked: Asked
    tokenized: Tokenized
    inferred: Inferred
    model: str = field(init=False)
    served: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        found, walked, family = self.inferred, self.inferred.walked, self.asked.family.name
        variants = walked.variants
        self.model = f"{family}:{variants[0]}" if len(variants) == 1 else family
        self.served = {
            "router": self.router,
            "family": family,
            "class": self.asked.quality.asked,
            "point": None if found.way.point is None else found.way.name,
            "bound": "none" if found.way.bound is None else found.way.bound,
            "variant": ",".join(variants),
            "stage": ",".join(map(str, walked.stages)),
            "gear": found.gear,
            "degraded": found.degraded,
            "truncated": self.tokenized.truncated,
            "tokenize_ms": round(self.tokenized.ms, 3),
            "queue_ms": round(walked.queue_ms, 3),
            "infer_ms": round(walked.infer_ms, 3),
        }

    @property
    def task(self) -> Task:
        return self.asked.family.task

    @property
    def values(self) -> Floats:
        return self.inferred.walked.values

    @property
    def scores(self) -> list[tuple[Floats, int]]:
        """Of each input: its labels' scores, float32 [width], and which of them is the highest."""
        task = self.task
        return [each.landed.shown(each.index, task) for each in self.inferred.walked.answered]

    @property
    def fettle(self) -> dict[str, Any]:
        """`served` for the body, with the way of each row where that was asked for."""
        if not self.asked.explain:
            return self.served
        explained = [[_step(visit) for visit in visits] for visits in self.inferred.walked.visits]
        return {**self.served, "explain": explained}

    @property
    def headers(self) -> dict[str, str]:
        """`served` for the headers."""
        return {
            HEADER_NAMES[name]: str(value).lower() if value is True else str(value)
            for name, value in self.served.items()
            if value is not None and value is not False
        }

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.tokenized.tokens, "total_tokens": self.tokenized.tokens}


class Endpoints:
    """The paths, bound to one router."""

    def __init__(self, router: Router) -> None:
        self._router = router
        # Of names, not of secrets: a call of the kernel for each of them would be dear.
        self._chance = random.Random()
        limit = router.limits
        self.readers: dict[str, BodyReader[Any]] = {path: BodyReader(model, limit) for path, model in ROW_PATHS.items()}

    @property
    def routes(self) -> list[Route]:
        scores = list[schemas.Score]
        return [
            ("/v1/embeddings", self.embeddings, schemas.EmbeddingsReply),
            ("/classify", self.classify, schemas.ClassifyReply),
            ("/embed", self.embed, list[list[float]]),
            ("/predict", self.predict, scores | list[scores]),
        ]

    async def embeddings(self, request: Request) -> Response:
        """Embeddings as the OpenAI API documents them."""
        body: schemas.EmbeddingsRequest = await self.readers["/v1/embeddings"](request)
        asked = self._ask(request, body, TaskKind.EMBED)
        shapes.check_dimensions(asked.family.task, body.dimensions)
        answer = await self._answer(asked, body.input, max_length=shapes.length_limit(body.truncate_prompt_tokens))
        vectors = truncated_vectors(answer.values, body.dimensions)
        encode = shapes.as_base64 if body.encoding_format == "base64" else shapes.as_floats
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ]
        content = {
            "object": "list",
            "data": data,
            "model": answer.model,
            "usage": answer.usage,
            "fettle": answer.fettle,
        }
        return reply(content, answer.headers)

    async def classify(self, request: Request) -> Response:
        """Classification as vLLM documents it."""
        body: schemas.ClassifyRequest = await self.readers["/classify"](request)
        asked = self._ask(request, body, TaskKind.CLASSIFY)
        answer = await self._answer(asked, body.input, max_length=shapes.length_limit(body.truncate_prompt_tokens))
        labels = shapes.labels(answer.task)
        data = [
            {"index": index, "label": labels[best], "probs": row, "num_classes": len(labels)}
            for index, (row, best) in enumerate(answer.scores)
        ]
        content = {
            "id": f"classify-{self._chance.getrandbits(128):032x}",
            "object": "list",
            "created": int(time.time()),
            "model": answer.model,
            "data": data,
            "usage": answer.usage,
            "fettle": answer.fettle,
        }
        return reply(content, answer.headers)

    async def embed(self, request: Request) -> Response:
        """Embeddings as TEI documents them: a list of vectors."""
        body: schemas.EmbedRequest = await self.readers["/embed"](request)
        asked = self._ask(request, body, TaskKind.EMBED)
        shapes.check_dimensions(asked.family.task, body.dimensions)
        if not body.normalize and asked.family.task.normalized:
            raise RequestError(
                "normalize: this model's vectors are normalised by the model itself; leave it true", param="normalize"
            )
        answer = await self._answer(asked, body.inputs, truncate=body.truncate is not False)
        vectors = truncated_vectors(answer.values, body.dimensions)
        return reply(normalized(vectors) if body.normalize else vectors, answer.headers)

    async def predict(self, request: Request) -> Response:
        """Classification as TEI documents it: scores of all labels, the highest first; pairs allowed."""
        body: schemas.PredictRequest = await self.readers["/predict"](request)
        asked = self._ask(request, body, TaskKind.CLASSIFY)
        texts, single = shapes.pairs(body.inputs)
        answer = await self._answer(asked, texts, truncate=body.truncate is not False)
        scores = answer.values if body.raw_scores else [row for row, _ in answer.scores]
        labels = shapes.labels(answer.task)
        ranked = [[{"score": row[i], "label": labels[i]} for i in np.argsort(-row, kind="stable")] for row in scores]
        return reply(ranked[0] if single else ranked, answer.headers)

    def _ask(self, request: Request, body: schemas.Wished, kind: TaskKind) -> Asked:
        asked = self._router.ask(body.model, kind, wishes_of(request, body), border.client_of(request))
        return notes.remember(request, asked)

    async def _answer(
        self, asked: Asked, inputs: Any, *, max_length: int | None = None, truncate: bool = True
    ) -> Answer:
        """`inputs` is a text, texts, pairs, token ids, or lists of them."""
        texts, ids = shapes.texts_or_ids(inputs)
        self._router.check_room(asked, len(texts or ids))
        if texts:
            tokenized = await self._router.tokenize(asked.family, texts, max_length=max_length, truncate=truncate)
        else:
            tokenized = self._router.rows_of_ids(asked.family, ids, max_length=max_length, truncate=truncate)
        inferred = await self._router.infer(asked, tokenized)
        return Answer(self._router.id, inferred.asked, tokenized, inferred)


def _step(visit: Visit) -> dict[str, Any]:
    """One step of a row's way, for `explain`."""
    answered, gates = visit.answered, visit.step.gates
    gate = gates[answered.stage]
    early = [] if answered.scores is None else answered.scores.tolist()
    return {
        "variant": visit.step.variant,
        "stage": answered.stage,
        "score": None if math.isnan(visit.score) else visit.score,
        "threshold": gate.threshold,
        "temperature": gate.temperature,
        "taken": visit.taken,
        "scores": [None if math.isnan(score) else score for score in early],
        "thresholds": [gate.threshold for gate in gates],
        "queue_ms": round(answered.queue_ms, 3),
        "infer_ms": round(answered.infer_ms, 3),
        "batch_rows": answered.batch_rows,
    }
