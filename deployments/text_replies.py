"""Reply bodies of text generation, as the OpenAPI document shows them; `deployments.text_shapes` writes them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokens(BaseModel):
    cached_tokens: int


class TextUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class Vote(BaseModel):
    drawn: int
    won: int


class TextServed(BaseModel):
    """Who answered, what is promised, and where the time went in milliseconds; an extension that clients may ignore."""

    router: str
    family: str
    quality: str = Field(alias="class", description="as it was asked: a share, a named class, `exact` or `pinned`")
    point: str | None
    bound: float | str = Field(description="certified upper bound of disagreement, `exact`, or `none`")
    variant: str
    gear: int
    degraded: bool
    tokenize_ms: float
    queue_ms: float
    infer_ms: float
    early_stop: Literal["uncertified"] | None = Field(default=None, description="the client's own thresholds were used")
    votes: list[Vote] | None = Field(default=None, description="by prompt")
    explain: dict[str, object] | None = None


class Finished(BaseModel):
    finish: str = Field(description="what stopped the text exactly, such as `early_answer`")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = Field(default=None, description="the stop text or token that ended it")
    fettle: Finished | None = None


class CompletionReply(BaseModel):
    """With `stream`, server-sent events of the same shape; the last of them is `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: TextUsage
    fettle: TextServed


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    fettle: Finished


class ChatReply(BaseModel):
    """With `stream`, server-sent events of `chat.completion.chunk` objects; the last of them is `[DONE]`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: TextUsage
    fettle: TextServed
