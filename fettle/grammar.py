"""Grammars that a generated text has to follow: JSON schemas, regular expressions, choices; by llguidance.

What cannot be followed (wrong, not supported, satisfied by no text, too complex) is the request's fault, and found out
in bounded time: before anything is generated where that is possible, otherwise for that generation alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any, Final

import numpy as np
import orjson
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from numpy.typing import NDArray

from fettle.errors import RequestError, UsageError, first_line
from fettle.generation import Constraint, GrammarSpec

# Where a fault is told to be, by kind.
PARAMS: Final = {
    "json_object": "response_format",
    "json_schema": "response_format",
    "regex": "guided_regex",
    "choice": "guided_choice",
}
LONGEST: Final = 64_000
LONGEST_REASON: Final = 300
KEPT: Final = 32
# So many steps are tried when a grammar is compiled: what is too complex is mostly so at once.
TRIED: Final = 3
# Some whitespace, so that a model which likes it cannot go on with it for ever; and nothing is ignored in silence.
JSON_OPTIONS: Final[dict[str, Any]] = {"whitespace_pattern": r"[ \n\r\t]{1,40}", "lenient": False}
# A step then takes some tens of milliseconds at worst, a grammar's states some ten megabytes.
LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 200_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}

Mask = NDArray[np.bool_]


class Grammars:
    """Compiles what is asked for, for one tokenizer; may be used by several threads."""

    def __init__(self, tokenizer: str, vocabulary: int, end_ids: Collection[int]) -> None:
        """Takes a second for a large vocabulary.

        Args:
            tokenizer: the text of a `tokenizer.json`.
            vocabulary: how many logits the model gives; at least as many as there are tokens.
            end_ids: tokens that end a text; they are allowed where a text is complete.

        Raises:
            UsageError: the tokenizer is of a kind that cannot be guided, or nothing ends a text.
        """
        try:
            self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(end_ids))
        except ValueError as error:
            raise UsageError(f"this model's texts cannot be made to follow a grammar: {first_line(error)}") from error
        self._vocabulary = vocabulary
        self._compiled = lru_cache(maxsize=KEPT)(self._compile)

    def constraint(self, spec: GrammarSpec) -> Constraint:
        """For one choice. What was compiled lately is kept.

        Raises:
            RequestError: no text can be made to follow it.
        """
        return _Guide(self._compiled(spec), self._vocabulary)

    def _compile(self, spec: GrammarSpec) -> _Grammar:
        param = PARAMS[spec.kind]
        if sum(map(len, spec.value)) > LONGEST:
            raise RequestError(f"{param}: longer than {LONGEST:,} characters", param=param)
        grammar = _Grammar(self._tokenizer, _source(spec), param)
        _try(grammar, self._vocabulary)
        return grammar


class _Grammar:
    """One that was compiled: makes matchers, which are at its beginning."""

    def __init__(self, tokenizer: LLTokenizer, source: str, param: str) -> None:
        self.param = param
        self._tokenizer = tokenizer
        self._source = source
        self._first = self.fresh()

    def fresh(self) -> LLMatcher:
        """Shares nothing with any other; to make it takes as long as compiling does."""
        return LLMatcher(self._tokenizer, self._source, log_level=0, limits=LLParserLimits(**LIMITS))

    def copy(self) -> LLMatcher:
        """Shares its lexer with all copies, and so what is left of the lexer's limits; takes microseconds."""
        copy = self._first.deep_copy()
        if _mask(copy) is None:
            self._first = self.fresh()
            copy = self._first.deep_copy()
        return copy

    def fault(self, matcher: LLMatcher) -> RequestError:
        return RequestError(f"{self.param}: {_reason(matcher.get_error())}", param=self.param)


class _Guide:
    """A grammar under way in one generation."""

    def __init__(self, grammar: _Grammar, vocabulary: int) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._matcher = grammar.copy()
        self._shared = True
        self._taken: list[int] = []

    def allowed(self) -> Mask:
        """Raises RequestError: it became too complex, or a token that was taken did not fit."""
        mask = _mask(self._matcher)
        if mask is None and self._shared:
            # Others may have used up the lexer that it shares with them.
            self._matcher, self._shared = self._grammar.fresh(), False
            self._matcher.consume_tokens(self._taken)
            mask = _mask(self._matcher)
        if mask is None:
            raise self._grammar.fault(self._matcher)
        return _unpacked(mask, self._vocabulary)

    def advance(self, token: int) -> None:
        """What does not fit is told by the next `allowed`."""
        self._taken.append(token)
        self._matcher.consume_token(token)


def _try(grammar: _Grammar, vocabulary: int) -> None:
    """Take a few steps. Raises RequestError where that is not possible."""
    matcher = grammar.copy()
    for _ in range(TRIED):
        mask = _mask(matcher)
        if mask is None:
            raise grammar.fault(matcher)
        if matcher.is_stopped():
            return
        allowed = np.flatnonzero(_unpacked(mask, vocabulary))
        matcher.consume_token(int(allowed[-1]))


def _mask(matcher: LLMatcher) -> bytes | None:
    """One bit a token; None where it failed: llguidance would then allow just the end."""
    mask = matcher.compute_bitmask()
    return None if matcher.is_error() else mask


def _unpacked(mask: bytes, vocabulary: int) -> Mask:
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=vocabulary, bitorder="little").view(np.bool_)


def _source(spec: GrammarSpec) -> str:
    """The grammar in llguidance's own form. Raises RequestError: what llguidance would not notice."""
    match spec.kind, spec.value:
        case "json_object", _:
            return LLMatcher.grammar_from_json_schema(_schema({"type": "object"}))
        case "json_schema", str(text):
            try:
                return LLMatcher.grammar_from_json_schema(_schema(orjson.loads(text)))
            except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
                raise RequestError(
                    f"response_format: the schema is no JSON ({error})", param="response_format"
                ) from error
        case "regex", str(text):
            # llguidance would leave it out.
            if (len(text) - len(text.rstrip("\\"))) % 2:
                raise RequestError("guided_regex: ends with a backslash", param="guided_regex")
            return _expression(text)
        case "choice", tuple(choices) if choices:
            return _expression("|".join(map(_literal, choices)))
    raise RequestError(f"{PARAMS[spec.kind]}: nothing to choose from", param=PARAMS[spec.kind])


def _schema(schema: object) -> str:
    if isinstance(schema, dict):
        schema = schema | {"x-guidance": JSON_OPTIONS}
    return orjson.dumps(schema).decode()


def _expression(text: str) -> str:
    r"""A whole text that matches; `\d` is an ASCII digit, other classes are Unicode's."""
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, use_ascii='d')}/")


def _literal(text: str) -> str:
    """A regular expression that matches just this text."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _reason(error: str) -> str:
    """What is wrong, in one line, from llguidance's report of several."""
    if "NoExtension" in error or not error:
        return "no text can be made to follow it"
    cause = re.search(r"^error: (.+)", error, re.MULTILINE)
    if cause is not None:
        return cause[1][:LONGEST_REASON]
    first = error.splitlines()[0]
    return re.sub(r"^(at )?\d+\(\d+\): (invalid regex .* \(in regex\): )?", "", first)[:LONGEST_REASON]
