"""From the bodies of text requests to calls: what a field means, what it has to do with others. Pure functions.

Every complaint names the field and what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from deployments.router import Asked
from deployments.safe_pattern import complaint
from deployments.text_schemas import (
    MOST_STOP_CHARACTERS,
    MOST_STOPS,
    ChatRequest,
    CompletionRequest,
    EarlyStopRequest,
    GenerateRequest,
)
from deployments.text_source import EarlyStop, Ids, TextCall
from fettle.errors import ContextLengthError, RequestError
from fettle.generation import GrammarSpec, Sampling
from fettle.manifest import Task

COMPLETION_TOKENS = 16


def completion_call(id: str, asked: Asked, body: CompletionRequest, prompts: Sequence[Ids]) -> TextCall:
    """Raises RequestError for fields that do not fit each other or the model."""
    scored = bool(body.echo) and body.logprobs is not None
    # Of candidates without log-probabilities nobody knows the best.
    logprobs = body.logprobs if body.logprobs is not None or _candidates(body) == (body.n or 1) else 0
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if most == 0 and not body.echo:
        raise RequestError(
            "max_tokens: must be at least 1 (0 only with echo, for the prompt alone)", param="max_tokens"
        )
    if body.stream and _candidates(body) != (body.n or 1):
        raise RequestError("best_of: the best are known at the end; set stream to false", param="best_of")
    return _call(
        id,
        asked,
        body,
        prompts,
        # A prompt alone is an answer whose one token is not told.
        max_tokens=max(1, most),
        said=body.max_tokens is not None,
        logprobs=logprobs,
        prompt_logprobs=scored,
    )


def chat_call(id: str, asked: Asked, body: ChatRequest, prompt: Ids, grammar: GrammarSpec | None) -> TextCall:
    """`grammar`: that of a tool which has to be called.

    Raises:
        RequestError: fields do not fit each other or the model.
    """
    limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise RequestError("max_tokens: is another than max_completion_tokens; send one of them", param="max_tokens")
    most = limits.pop() if limits else None
    if most == 0:
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise RequestError(f"{name}: must be at least 1", param=name)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs: set logprobs to true with it", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    said = most is not None
    return _call(id, asked, body, [prompt], max_tokens=most, said=said, logprobs=logprobs, grammar=grammar)


def check_stream_options(body: GenerateRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: set stream to true with them", param="stream_options")


def check_ids(ids: Sequence[int], vocabulary: int, param: str) -> None:
    bad = next((token for token in ids if not 0 <= token < vocabulary), None)
    if bad is not None:
        raise RequestError(f"{param}: token id {bad} is outside the vocabulary (0 to {vocabulary - 1})", param=param)


def _call(
    id: str,
    asked: Asked,
    body: GenerateRequest,
    prompts: Sequence[Ids],
    *,
    max_tokens: int | None,
    said: bool,
    logprobs: int | None,
    grammar: GrammarSpec | None = None,
    prompt_logprobs: bool = False,
) -> TextCall:
    """`said`: the client itself gave the limit, so there must be room for it."""
    vocabulary = asked.family.tokenizer.spec.vocabulary
    field = "prompt" if isinstance(body, CompletionRequest) else "messages"
    for prompt in prompts:
        check_room(len(prompt), max_tokens if said else None, asked.family.context, field)
    least = body.min_tokens or 0
    if max_tokens is not None and least > max_tokens:
        raise RequestError(
            f"min_tokens: {least} are more than the {max_tokens} of max_tokens; raise those", param="min_tokens"
        )
    stop_ids = body.stop_token_ids or []
    check_ids(stop_ids, vocabulary, "stop_token_ids")
    vote = body.answers == "vote"
    if vote:
        _check_vote(body)
    return TextCall(
        id=id,
        asked=asked,
        prompts=tuple(prompts),
        sampling=sampling_of(body, logprobs, vocabulary),
        choices=_candidates(body),
        max_tokens=max_tokens,
        min_tokens=least,
        ignore_end=bool(body.ignore_eos),
        stop=stops_of(body),
        stop_ids=frozenset(stop_ids),
        keep_stop=bool(body.include_stop_str_in_output),
        grammar=_only([grammar, *_grammars(body)]),
        prompt_logprobs=prompt_logprobs,
        early_stop=None if body.early_stop is None else early_stop_of(body.early_stop, asked.family.task),
        vote=vote,
        stream=bool(body.stream),
    )


def check_room(prompt: int, most: int | None, context: int, field: str) -> None:
    """Raises ContextLengthError unless the prompt, and as many tokens as were asked for, fit the context."""
    if prompt >= context:
        raise ContextLengthError(
            f"{field}: {prompt} tokens, of {context} that the model's context holds with the answer; shorten it",
            param=field,
        )
    if most is not None and prompt + most > context:
        raise ContextLengthError(
            f"max_tokens: the prompt's {prompt} tokens and {most} more do not fit the model's context of {context}; "
            f"ask for at most {context - prompt}, or shorten the prompt",
            param="max_tokens",
        )


def sampling_of(body: GenerateRequest, logprobs: int | None, vocabulary: int) -> Sampling:
    """Defaults are OpenAI's, whatever the checkpoint recommends."""
    # Of a mass of nothing the most likely token remains.
    nothing = body.top_p == 0
    return Sampling(
        temperature=_or(body.temperature, 1.0),
        top_p=1.0 if nothing else _or(body.top_p, 1.0),
        top_k=1 if nothing else max(0, body.top_k or 0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_biases(body.logit_bias or {}, vocabulary),
        seed=None if body.seed is None else body.seed % 2**63,
        logprobs=logprobs,
    )


def stops_of(body: GenerateRequest) -> tuple[str, ...]:
    stops = [body.stop] if isinstance(body.stop, str) else (body.stop or [])
    if len(stops) > MOST_STOPS:
        raise RequestError(f"stop: {len(stops)} texts, the limit is {MOST_STOPS}", param="stop")
    if not all(stops):
        raise RequestError("stop: a text to stop at must not be empty; leave it out", param="stop")
    if sum(map(len, stops)) > MOST_STOP_CHARACTERS:
        raise RequestError(f"stop: more than {MOST_STOP_CHARACTERS} characters; shorten the texts", param="stop")
    return tuple(stops)


def early_stop_of(given: EarlyStopRequest, task: Task) -> EarlyStop:
    if not given.model_dump(exclude_none=True):
        raise RequestError("early_stop: set at least one of its thresholds, or leave it out", param="early_stop")
    if given.answer_confidence is not None and given.answer_pattern is None and task.answer is None:
        raise RequestError(
            "early_stop.answer_pattern: is needed to find the answer whose confidence counts",
            param="early_stop.answer_pattern",
        )
    wrong = None if given.answer_pattern is None else complaint(given.answer_pattern)
    if wrong is not None:
        raise RequestError(f"early_stop.answer_pattern: {wrong}; simplify it", param="early_stop.answer_pattern")
    return EarlyStop(given.end_probability, given.answer_confidence, given.answer_pattern, given.reasoning_budget)


def _grammars(body: GenerateRequest) -> list[GrammarSpec]:
    form = body.response_format
    found: list[GrammarSpec] = []
    if form is not None and form.type == "json_object":
        found.append(GrammarSpec("json_object"))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise RequestError(
                "response_format.json_schema: is needed with its schema for type `json_schema`",
                param="response_format.json_schema",
            )
        found.append(GrammarSpec("json_schema", orjson.dumps(form.json_schema.schema_).decode()))
    if body.guided_json is not None:
        found.append(GrammarSpec("json_schema", _schema_text(body.guided_json)))
    if body.guided_regex is not None:
        found.append(GrammarSpec("regex", body.guided_regex))
    if body.guided_choice is not None:
        found.append(GrammarSpec("choice", tuple(body.guided_choice)))
    return found


def _only(grammars: Sequence[GrammarSpec | None]) -> GrammarSpec | None:
    given = [grammar for grammar in grammars if grammar is not None]
    if len(given) > 1:
        raise RequestError(
            "response_format: only one of response_format, guided_json, guided_regex, guided_choice and a tool that "
            "has to be called can say what the text is",
            param="response_format",
        )
    return given[0] if given else None


def _schema_text(schema: str | Mapping[str, object]) -> str:
    if not isinstance(schema, str):
        return orjson.dumps(schema).decode()
    try:
        parsed = orjson.loads(schema)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"guided_json: is no JSON ({error})", param="guided_json") from None
    if not isinstance(parsed, dict):
        raise RequestError("guided_json: must be a JSON schema, which is an object", param="guided_json")
    return schema


def _check_vote(body: GenerateRequest) -> None:
    if (body.n or 1) < 2:
        raise RequestError("n: a vote needs at least 2 candidates; raise it", param="n")
    if body.temperature == 0:
        raise RequestError("temperature: at 0 all candidates are the same; raise it for a vote", param="temperature")
    if isinstance(body, CompletionRequest) and body.best_of not in (None, body.n):
        raise RequestError("best_of: the vote chooses; leave it out", param="best_of")


def _candidates(body: GenerateRequest) -> int:
    """How many choices are generated for each prompt."""
    wanted = body.n or 1
    if not isinstance(body, CompletionRequest) or body.best_of is None:
        return wanted
    if body.best_of < wanted:
        raise RequestError(f"best_of: {body.best_of} are fewer than the {wanted} of n; raise it", param="best_of")
    return body.best_of


def _biases(given: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(f"logit_bias: {key!r} is no token id", param="logit_bias")
    biases = {int(key): bias for key, bias in given.items()}
    check_ids(list(biases), vocabulary, "logit_bias")
    return biases


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
