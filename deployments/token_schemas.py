"""Bodies of `/tokenize`, in the shapes of vLLM (of texts and of conversations) and TEI, and of vLLM's `/detokenize`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Field, Tag

from deployments.schemas import Body, Text, Texts
from deployments.text_schemas import Conversation


class VllmTokenizeRequest(Body):
    """vLLM's `POST /tokenize`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class VllmTokenizeChatRequest(Conversation):
    """vLLM's `POST /tokenize` of messages, which the model's chat template makes a prompt of."""

    model: str | None = None
    add_special_tokens: bool = Field(default=False, description="beside those that the template writes")
    return_token_strs: bool = False


class TeiTokenizeRequest(Body):
    """TEI's `POST /tokenize`."""

    inputs: Text | Texts
    model: str | None = None
    add_special_tokens: bool = True


def _tokenize_shape(body: Any) -> str:
    if isinstance(body, dict) and "messages" in body:
        return "VllmTokenizeChatRequest"
    return "VllmTokenizeRequest" if isinstance(body, dict) and "prompt" in body else "TeiTokenizeRequest"


# Told apart by their field, so that a complaint is about the shape that the client meant.
TokenizeRequest = Annotated[
    Annotated[VllmTokenizeRequest, Tag("VllmTokenizeRequest")]
    | Annotated[VllmTokenizeChatRequest, Tag("VllmTokenizeChatRequest")]
    | Annotated[TeiTokenizeRequest, Tag("TeiTokenizeRequest")],
    Discriminator(_tokenize_shape),
]


class DetokenizeRequest(Body):
    """vLLM's `POST /detokenize`."""

    tokens: list[Annotated[int, Field(ge=0, le=2**31 - 1)]]
    model: str | None = None


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TeiToken(BaseModel):
    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class DetokenizeReply(BaseModel):
    prompt: str
