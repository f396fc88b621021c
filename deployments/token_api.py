"""The paths between texts and token ids: `/tokenize`, of texts and of conversations, and `/detokenize`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from tokenizers import Encoding

from deployments import token_schemas
from deployments.border import BodyReader, Route, reply
from deployments.conversations import Conversations
from deployments.router import Router
from deployments.served import ServedFamily
from deployments.text_schemas import REMEDIES
from fettle.errors import RequestError


class TokenEndpoints:
    """The paths, bound to one router."""

    def __init__(self, router: Router, conversations: Conversations) -> None:
        self._router = router
        self._conversations = conversations
        limit = router.limits
        # A text to tokenize is a text only, whatever a prompt may be elsewhere.
        remedies = {field: remedy for field, remedy in REMEDIES.items() if field != "prompt"}
        self.readers: dict[str, BodyReader[Any]] = {
            "/tokenize": BodyReader(token_schemas.TokenizeRequest, limit, remedies),
            "/detokenize": BodyReader(token_schemas.DetokenizeRequest, limit),
        }

    @property
    def routes(self) -> list[Route]:
        tokens = token_schemas.TokenizeReply | list[list[token_schemas.TeiToken]]
        return [
            ("/tokenize", self.tokenize, tokens),
            ("/detokenize", self.detokenize, token_schemas.DetokenizeReply),
        ]

    async def tokenize(self, request: Request) -> Response:
        """Token ids, in vLLM's shape for `prompt` and `messages`, and in TEI's for `inputs`."""
        body = await self.readers["/tokenize"](request)
        family, _ = self._router.find(body.model)
        if isinstance(body, token_schemas.TeiTokenizeRequest):
            texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
            self._router.check_inputs(len(texts))
            return reply(await asyncio.to_thread(_tei_tokens, family, texts, special=body.add_special_tokens))
        if isinstance(body, token_schemas.VllmTokenizeChatRequest):
            text = await self._conversations.prompt(family, body)
        else:
            text = body.prompt
        encoding = await asyncio.to_thread(family.tokenizer.pieces, text, special=body.add_special_tokens)
        content = {
            "count": len(encoding.ids),
            "max_model_len": family.context,
            "tokens": encoding.ids,
            "token_strs": encoding.tokens if body.return_token_strs else None,
        }
        return reply(content)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, in vLLM's shape."""
        body: token_schemas.DetokenizeRequest = await self.readers["/detokenize"](request)
        family, _ = self._router.find(body.model)
        vocabulary = family.tokenizer.spec.vocabulary
        bad = next((token for token in body.tokens if token >= vocabulary), None)
        if bad is not None:
            raise RequestError(
                f"tokens: token id {bad} is outside the vocabulary (0 to {vocabulary - 1})", param="tokens"
            )
        return reply({"prompt": await asyncio.to_thread(family.tokenizer.text, body.tokens)})


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
