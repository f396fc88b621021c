"""From pieces of text to OpenAI's replies, whole or in chunks: completions and chat completions. No HTTP.

A shape holds what it has told of each choice so far, so that one is made for each request.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.text_source import Answering, Piece, Spent, TextCall
from deployments.tool_calls import CallPart, Reader, ToolPlan, call_parts, whole_calls
from fettle.detokenize import TextStream
from fettle.generation import Finish, Token
from fettle.spelling import shown
from fettle.tokenizer import Tokenizer

# OpenAI's words for it; the exact reason stands beside them.
FINISH_REASONS = {
    Finish.STOP: "stop",
    Finish.LENGTH: "length",
    Finish.CONTEXT: "length",
    Finish.CANCELLED: "length",
    Finish.EARLY_END: "stop",
    Finish.EARLY_ANSWER: "stop",
    Finish.EARLY_VOTE: "stop",
    Finish.ESCALATED: "stop",
}
# OpenAI's number for a token that cannot come: JSON has no infinity.
IMPOSSIBLE = -9999.0

Json = dict[str, Any]


@dataclass(slots=True)
class Gathered:
    """A whole choice: its pieces put together."""

    index: int
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    prompt: tuple[Token, ...] | None = None
    finish: Finish | None = None
    stopped_by: str | int | None = None

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.tokens += piece.tokens
        self.prompt = self.prompt or piece.prompt
        if piece.finish is not None:
            self.finish, self.stopped_by = piece.finish, piece.stopped_by

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; how the best of several candidates is found."""
        return sum(token.logprob for token in self.tokens) / len(self.tokens) if self.tokens else -math.inf

    def as_piece(self) -> Piece:
        return Piece(self.index, "".join(self.texts), tuple(self.tokens), self.finish, self.stopped_by, self.prompt)


class Shape(Protocol):
    """One of OpenAI's two kinds of replies; `object` and `chunk_object` are its names."""

    object: str
    chunk_object: str

    def parts(self, piece: Piece) -> list[Json]:
        """The choices of the chunks that tell this piece, one a chunk; none where there is nothing to tell yet."""
        ...

    def whole(self, choice: Gathered) -> Json:
        """The choice of a whole reply."""
        ...


class CompletionShape:
    """Choices of a completion.

    `echo`: the prompts' texts, each told before the choices of its prompt; `bare`: nothing but these is told.
    """

    object = chunk_object = "text_completion"

    def __init__(self, call: TextCall, echo: Sequence[str] | None = None, *, logprobs: bool, bare: bool) -> None:
        self._call = call
        self._echo = echo
        self._logprobs = logprobs
        self._bare = bare
        self._choices: dict[int, _Completion] = {}

    def parts(self, piece: Piece) -> list[Json]:
        choice = self._choices.get(piece.choice)
        if choice is None:
            choice = self._choices[piece.choice] = self._begin(piece.choice)
        text, tokens = ("", ()) if self._bare else (piece.text, piece.tokens)
        logprobs = None
        if choice.offsets is not None:
            logprobs = completion_logprobs(piece.prompt, tokens, choice.offsets)
        text = choice.echo + text
        choice.echo = ""
        if not (text or logprobs or piece.finish):
            return []
        return [{"index": piece.choice, "text": text, "logprobs": logprobs, **finish_fields(piece, self._call)}]

    def whole(self, choice: Gathered) -> Json:
        [part] = self.parts(choice.as_piece())
        return part

    def _begin(self, number: int) -> _Completion:
        call = self._call
        place = number if call.vote else number // call.choices
        echo = "" if self._echo is None else self._echo[place]
        offsets = None
        if self._logprobs:
            tokenizer = call.asked.family.tokenizer
            offsets = Offsets(tokenizer, call.prompts[place].tolist(), len(echo))
        return _Completion(echo, offsets)


@dataclass(slots=True)
class _Completion:
    """`echo`: what is still to be told of the prompt."""

    echo: str
    offsets: Offsets | None


class ChatShape:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, call: TextCall, plan: ToolPlan) -> None:
        self._call = call
        self._plan = plan
        self._tokenizer = call.asked.family.tokenizer
        self._logprobs = call.sampling.logprobs
        self._readers: dict[int, Reader] = {}

    def parts(self, piece: Piece) -> list[Json]:
        made, index = [], piece.choice
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = self._plan.reader()
            made.append({"role": "assistant", "content": ""})
        read = reader.read(piece.text, last=piece.finish is not None)
        logprobs = self._told(piece.tokens)
        if read.content or read.calls or logprobs:
            made.append(_delta(read.content, read.calls))
        parts: list[Json] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in made
        ]
        if logprobs:
            parts[-1]["logprobs"] = logprobs
        if piece.finish is not None:
            finish = finish_fields(piece, self._call, called=reader.called)
            parts.append({"index": index, "delta": {}, "logprobs": None, **finish})
        return parts

    def whole(self, choice: Gathered) -> Json:
        reader = self._plan.reader()
        read = reader.read("".join(choice.texts), last=True)
        content = (read.content or None) if read.calls else read.content
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if read.calls:
            message["tool_calls"] = whole_calls(read.calls)
        told = self._told(choice.tokens)
        finish = finish_fields(choice.as_piece(), self._call, called=reader.called)
        return {"index": choice.index, "message": message, "logprobs": told, **finish}

    def _told(self, tokens: Sequence[Token]) -> Json | None:
        if self._logprobs is None or not tokens:
            return None
        return chat_logprobs(tokens, self._tokenizer, self._logprobs)


def _delta(content: str, calls: Sequence[CallPart]) -> Json:
    made: Json = {}
    if content or not calls:
        made["content"] = content
    if calls:
        made["tool_calls"] = call_parts(calls)
    return made


def finish_fields(piece: Piece, call: TextCall, *, called: bool = False) -> Json:
    """How a choice ended, if it did: OpenAI's word, vLLM's `stop_reason`, and Fettle's own."""
    if piece.finish is None:
        return {"finish_reason": None}
    reason, stop = FINISH_REASONS[piece.finish], piece.stopped_by
    # The model's own end tokens are the usual way to end, and no reason.
    own = isinstance(stop, str) or stop in call.stop_ids
    return {
        "finish_reason": "tool_calls" if called and reason == "stop" else reason,
        "stop_reason": stop if own else None,
        "fettle": {"finish": piece.finish.value},
    }


class Offsets:
    """Where the tokens of one choice begin in its text, in characters; the prompt's, where it is told, before them."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], echoed: int) -> None:
        self.tokenizer = tokenizer
        self._echoed = echoed
        self._before: TextStream = tokenizer.detokenizer.stream(skip_special=False)
        self._after: TextStream = tokenizer.detokenizer.stream(before=prompt)

    def of_prompt(self, tokens: Sequence[Token]) -> list[int]:
        """Of all of the prompt's tokens. Those that the tokenizer put before a text are not in what is told of it."""
        offsets = _offsets(self._before, tokens)
        added = max(0, self._before.length - self._echoed)
        return [max(0, offset - added) for offset in offsets]

    def of(self, tokens: Sequence[Token]) -> list[int]:
        return [self._echoed + offset for offset in _offsets(self._after, tokens)]


def _offsets(stream: TextStream, tokens: Sequence[Token]) -> list[int]:
    for token in tokens:
        stream.push(token.id)
    return stream.offsets[len(stream.offsets) - len(tokens) :]


def completion_logprobs(prompt: Sequence[Token] | None, tokens: Sequence[Token], offsets: Offsets) -> Json | None:
    """As completions have them: four lists, with the prompt's tokens first where they are wanted."""
    told = [*(prompt or ()), *tokens]
    if not told:
        return None
    names = _Names(offsets.tokenizer)
    return {
        "tokens": [names.of(token.id) for token in told],
        "token_logprobs": [number(token.logprob) for token in told],
        "top_logprobs": [_tops(token, names) for token in told],
        "text_offset": offsets.of_prompt(prompt or ()) + offsets.of(tokens),
    }


def _tops(token: Token, names: _Names) -> dict[str, float | None] | None:
    """The most likely ones and the token itself, so there may be one more than was asked for."""
    if math.isnan(token.logprob):
        return None
    tops = {names.of(other): number(logprob) for other, logprob in token.top}
    tops.setdefault(names.of(token.id), number(token.logprob))
    return tops


def chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer, most: int) -> Json:
    """As chat completions have them: one entry a token, with its bytes."""
    names = _Names(tokenizer)
    return {
        "content": [
            {
                **names.entry(token.id, token.logprob),
                "top_logprobs": [names.entry(other, logprob) for other, logprob in token.top[:most]],
            }
            for token in tokens
        ],
        "refusal": None,
    }


class _Names:
    """Tokens by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._spelling = tokenizer.spelling

    def of(self, token: int) -> str:
        return shown(self._spelling.bytes_of(token))

    def entry(self, token: int, logprob: float) -> Json:
        spelled = self._spelling.bytes_of(token)
        return {"token": shown(spelled), "logprob": number(logprob), "bytes": list(spelled)}


def number(logprob: float) -> float | None:
    """A log-probability as JSON can hold it; None where there is none."""
    if math.isnan(logprob):
        return None
    return logprob if math.isfinite(logprob) else IMPOSSIBLE


def usage(call: TextCall, spent: Spent, *, bare: bool = False) -> Json:
    """A prompt counts once, however many choices it has."""
    prompt = sum(map(len, call.prompts))
    completion = 0 if bare else spent.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": spent.cached_tokens},
    }


def served(
    router: str, call: TextCall, answering: Answering, tokenize_ms: float, spent: Spent | None = None
) -> dict[str, Any]:
    """Who answered, what is promised, and where the time went; as the other endpoints tell it."""
    asked, own = call.asked, call.early_stop is not None
    told: dict[str, Any] = {
        "router": router,
        "family": asked.family.name,
        "class": asked.quality.asked,
        "point": answering.point,
        # What a client's own thresholds do to an answer, no certificate covers.
        "bound": "none" if own or answering.bound is None else answering.bound,
        "variant": ",".join((spent.variants if spent is not None else None) or answering.variants),
        "gear": answering.gear,
        "degraded": answering.degraded,
        "tokenize_ms": round(tokenize_ms, 3),
        "queue_ms": round(answering.queue_ms, 3),
    }
    if own:
        told["early_stop"] = "uncertified"
    if spent is not None:
        told["infer_ms"] = round(spent.infer_ms, 3)
        if spent.votes:
            told["votes"] = [{"drawn": vote.drawn, "won": vote.won} for vote in spent.votes]
        if asked.explain and spent.explained is not None:
            told["explain"] = spent.explained
    return told


def headers_of(told: dict[str, Any]) -> dict[str, str]:
    """The same for headers: what is one value, and says something."""
    return {
        f"x-fettle-{name.replace('_', '-')}": str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in told.items()
        if value is not None and value is not False and not isinstance(value, list | dict)
    }


def model_name(call: TextCall, variants: Sequence[str]) -> str:
    """The variant that answered, or the family where several did."""
    name = call.asked.family.name
    return f"{name}:{variants[0]}" if len(variants) == 1 else name


def fingerprint(call: TextCall, variants: Sequence[str]) -> str:
    """Changes as soon as what answers does: the hash of the variants' manifests."""
    entries = {entry.id: entry.manifest_sha256 for entry in call.asked.family.family.manifest.variants}
    return "fp_" + hashlib.sha256("".join(entries[name] for name in variants).encode()).hexdigest()[:12]
