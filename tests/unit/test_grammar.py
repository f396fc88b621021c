"""Grammars: what is generated from random logits follows them, and what cannot be followed is refused in good time."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fettle.errors import RequestError, UsageError
from fettle.generation import Constraint, Finish, GrammarSpec, Prompt, Sampling, Token
from fettle.grammar import LIMITS, Grammars
from fettle.sampling import Draw, Sampler

TEXTS = ['{"name": "Ada", "age": 36, "tags": ["a", "b"]}', "yes or no, 2024-01-31", "漢字 é \n true false null"]
# Some logits more than there are tokens, as models have them.
SPARE = 6
# Far more than anything here takes, even on a busy machine.
BOUNDED_S = 20.0


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|end|>", "<|turn|>")])
    return tokenizer


def byte_fallback() -> Tokenizer:
    vocabulary = {"<unk>": 0, "<|end|>": 1, "<|turn|>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    pieces = ["▁", "▁yes", "no", '{"', '":', '",', "}", "true", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary |= {piece: 259 + place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<|end|>", "<|turn|>"])
    return tokenizer


class Language:
    """A tokenizer with its grammars, and a model that likes nothing in particular."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.get_vocab_size() + SPARE
        self.ends = frozenset(tokenizer.token_to_id(token) for token in ("<|end|>", "<|turn|>"))
        self.grammars = Grammars(tokenizer.to_str(), self.vocabulary, self.ends)

    def write(self, spec: GrammarSpec, seed: int, most: int = 600) -> tuple[str, bool]:
        """A text drawn from random logits, and whether it came to its end."""
        sampler, rng = Sampler(self.vocabulary), np.random.default_rng(seed)
        prompt = Prompt(
            id="a",
            ids=np.zeros(1, np.int32),
            max_tokens=most,
            sampling=Sampling(seed=seed, temperature=1.5),
            end_ids=self.ends,
            constraint=self.grammars.constraint(spec),
        )
        draw, ids = Draw(prompt, self.vocabulary), []
        while len(ids) < most:
            (token,) = sampler.sample(rng.standard_normal((1, self.vocabulary), np.float32), [draw])
            assert isinstance(token, Token), token
            if token.id in self.ends:
                return self.tokenizer.decode(ids), True
            ids.append(token.id)
            draw.take(token.id)
        return self.tokenizer.decode(ids), False

    def follows(self, spec: GrammarSpec, text: str) -> bool:
        """Whether the text, in the tokenizer's own tokens, is allowed and may end there."""
        constraint = self.grammars.constraint(spec)
        for token in self.tokenizer.encode(text).ids:
            if not allowed(constraint)[token]:
                return False
            constraint.advance(token)
        return bool(allowed(constraint)[list(self.ends)].all())


def allowed(constraint: Constraint) -> np.ndarray:
    mask = constraint.allowed()
    assert mask is not None
    return mask


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


BYTE_LEVEL = Language(byte_level())
BOTH = pytest.mark.parametrize("language", [BYTE_LEVEL, Language(byte_fallback())], ids=["byte level", "byte fallback"])

SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["a", "b\n", "漢"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"const": 3}, "c": {"type": "string", "pattern": "^[a-c]{1,4}$"}},
        "additionalProperties": False,
    },
    "nested": {
        "$defs": {"leaf": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"],
                           "additionalProperties": False}},
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "integer", "minimum": 5, "maximum": 9}]},
        "maxItems": 4,
    },
    "date": {"type": "string", "format": "date"},
}  # fmt: skip


# What is generated


@BOTH
@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_written_is_json_of_the_schema(language: Language, name: str):
    written = set()
    for seed in range(12):
        text, whole = language.write(schema(SCHEMAS[name]), seed)
        assert whole
        jsonschema.validate(json.loads(text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())
        written.add(text)
    assert len(written) > 3


@BOTH
def test_whatever_is_written_is_a_json_object(language: Language):
    objects = [
        text for text, whole in (language.write(GrammarSpec("json_object"), seed) for seed in range(40)) if whole
    ]
    assert len(objects) > 5
    assert all(isinstance(json.loads(text), dict) for text in objects)


@BOTH
def test_whatever_is_written_matches_the_expression(language: Language):
    pattern = r"(yes|no), \d{4}-\d\d( é[a-c/]{1,3}){0,2}"
    for seed in range(20):
        text, whole = language.write(GrammarSpec("regex", pattern), seed)
        assert whole
        assert re.fullmatch(pattern, text)


AWKWARD = (
    "a\nb",
    "\t",
    "\x00\x7f",
    "\u2028",
    'say "no"',
    "C:\\u0041",
    "/x|y/",
    "(a)*",
    "$^",
    "漢字 👩\u200d👧",
    " lead",
    "",
)


@BOTH
def test_whatever_is_written_is_one_of_the_choices(language: Language):
    spec = GrammarSpec("choice", AWKWARD)
    assert all(language.follows(spec, choice) for choice in AWKWARD)
    assert not language.follows(spec, "x")
    assert not language.follows(spec, "a")
    assert all(language.write(spec, seed)[0] in AWKWARD for seed in range(30))


def test_an_expression_is_about_the_whole_text():
    assert BYTE_LEVEL.follows(GrammarSpec("regex", "\\\\"), "\\")
    assert BYTE_LEVEL.follows(GrammarSpec("regex", "^no$"), "no")
    assert not BYTE_LEVEL.follows(GrammarSpec("regex", "no"), "no, no")
    assert BYTE_LEVEL.follows(GrammarSpec("regex", 'a/\nb: "c"'), 'a/\nb: "c"')


def test_whitespace_in_json_is_free_but_not_endless():
    spec = schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    for text in ('{"a":1}', '{"a": 1}', '{\n  "a": 1\n}'):
        assert BYTE_LEVEL.follows(spec, text)
    assert not BYTE_LEVEL.follows(spec, '{"a":' + " " * 50 + "1}")


def test_special_tokens_and_spare_logits_are_never_allowed_inside():
    mask = allowed(BYTE_LEVEL.grammars.constraint(GrammarSpec("regex", "(.|\n)+")))
    assert mask.shape == (BYTE_LEVEL.vocabulary,)
    assert not mask[list(BYTE_LEVEL.ends)].any()
    assert not mask[-SPARE:].any()
    assert mask[BYTE_LEVEL.tokenizer.token_to_id("y")]


def test_when_the_text_is_complete_only_the_end_is_allowed():
    constraint = BYTE_LEVEL.grammars.constraint(GrammarSpec("choice", ("yes",)))
    for token in BYTE_LEVEL.tokenizer.encode("yes").ids:
        constraint.advance(token)
    assert set(np.flatnonzero(allowed(constraint))) == BYTE_LEVEL.ends
    constraint.advance(min(BYTE_LEVEL.ends))
    assert set(np.flatnonzero(allowed(constraint))) <= BYTE_LEVEL.ends


def test_a_complete_text_ends_even_where_it_is_too_early():
    prompt = Prompt(
        id="a",
        ids=np.zeros(1, np.int32),
        max_tokens=50,
        end_ids=BYTE_LEVEL.ends,
        min_tokens=20,
        constraint=BYTE_LEVEL.grammars.constraint(GrammarSpec("choice", ("yes",))),
    )
    draw, outcomes = Draw(prompt, BYTE_LEVEL.vocabulary), []
    while not outcomes or isinstance(outcomes[-1], Token):
        outcomes += Sampler(BYTE_LEVEL.vocabulary).sample(np.zeros((1, BYTE_LEVEL.vocabulary), np.float32), [draw])
        if isinstance(outcomes[-1], Token):
            draw.take(outcomes[-1].id)
    assert outcomes[-1] is Finish.STOP
    assert len(outcomes) < 5


def test_choices_of_one_grammar_go_their_own_ways():
    spec = GrammarSpec("regex", "(yes|no)")
    first, second = (BYTE_LEVEL.grammars.constraint(spec) for _ in range(2))
    before = allowed(second)
    first.advance(BYTE_LEVEL.tokenizer.token_to_id("y"))
    assert (allowed(second) == before).all()
    assert not (allowed(first) == before).all()


def test_what_was_compiled_is_kept():
    spec = GrammarSpec("choice", ("one", "two", "three"))
    BYTE_LEVEL.grammars.constraint(spec)
    hits = BYTE_LEVEL.grammars._compiled.cache_info().hits
    for _ in range(10):
        BYTE_LEVEL.grammars.constraint(spec)
    assert BYTE_LEVEL.grammars._compiled.cache_info().hits == hits + 10


def test_threads_compile_at_the_same_time():
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda seed: BYTE_LEVEL.write(schema(SCHEMAS["nested"]), seed), range(24)))
    assert texts == [BYTE_LEVEL.write(schema(SCHEMAS["nested"]), seed) for seed in range(24)]


def test_what_others_used_up_is_no_fault_of_a_generation(monkeypatch: pytest.MonkeyPatch):
    """Copies of a grammar share a lexer and its limits: one that hits them goes on with a lexer of its own."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 1000)
    spec = GrammarSpec("regex", r"(\p{L}{1,50} ){1,200}")
    rng = np.random.default_rng(0)
    # With grammars of its own, so that the lexer is new.
    grammars = Grammars(BYTE_LEVEL.tokenizer.to_str(), BYTE_LEVEL.vocabulary, BYTE_LEVEL.ends)
    constraints = [grammars.constraint(spec) for _ in range(12)]
    for constraint in constraints:
        for _ in range(30):
            constraint.advance(int(rng.choice(np.flatnonzero(allowed(constraint)))))
    assert {constraint._shared for constraint in constraints} == {True, False}
    # Nor of those that begin later, which share again.
    later = grammars.constraint(spec)
    assert allowed(later).any()
    assert later._shared


# What cannot be followed


FAULTS = {
    "unclosed": (GrammarSpec("regex", "(ab"), "guided_regex: unclosed group"),
    "look-ahead": (GrammarSpec("regex", "a(?=b)"), "guided_regex: look-around.* not supported"),
    "word boundary": (GrammarSpec("regex", r"\bfoo"), "guided_regex: lookarounds not supported"),
    "back reference": (GrammarSpec("regex", r"(a)\1"), "guided_regex: backreferences are not supported"),
    "empty class": (GrammarSpec("regex", "[a-z&&[^a-z]]"), "guided_regex: no text"),
    "backslash": (GrammarSpec("regex", "a\\\\\\"), "guided_regex: ends with a backslash"),
    "no choices": (GrammarSpec("choice", ()), "guided_choice: nothing to choose from"),
    "no JSON": (GrammarSpec("json_schema", "{nope"), "response_format: the schema is no JSON"),
    "no schema": (schema([1]), "response_format: schema must be an object or boolean"),
    "unknown type": (schema({"type": "strin"}), "response_format: Invalid type: strin"),
    "not supported": (schema({"not": {}}), "response_format: Unimplemented keys.*not"),
    "not supported, lenient": (
        schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}),
        "response_format: Unimplemented keys.*uniqueItems",
    ),
    "false": (schema(False), "response_format: Unsatisfiable"),
    "no number": (schema({"type": "number", "minimum": 5, "maximum": 3}), "response_format: Unsatisfiable"),
    "no value": (schema({"type": "string", "enum": [1, 2]}), "response_format: Unsatisfiable"),
    "no property": (
        schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
        "response_format: Unsatisfiable",
    ),
    "in a circle": (schema({"$ref": "#"}), "response_format: "),
    "elsewhere": (schema({"$ref": "http://example.com/schema"}), "response_format: Resource"),
}


@pytest.mark.parametrize(("spec", "message"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_followed_is_the_requests_fault(spec: GrammarSpec, message: str):
    with pytest.raises(RequestError, match=message) as caught:
        BYTE_LEVEL.grammars.constraint(spec)
    assert caught.value.param == message.split(":")[0]
    assert caught.value.status == 400
    assert len(caught.value.message) < 400
    assert "\n" not in caught.value.message


def nested(depth: int) -> GrammarSpec:
    return GrammarSpec("json_schema", '{"type":"array","items":' * depth + "{}" + "}" * depth)


properties = {f"p{number}": {"type": "string"} for number in range(1800)}
HOSTILE = {
    "long": GrammarSpec("regex", "a" * 10_000_000),
    "many choices": GrammarSpec("choice", ("abcd",) * 1_000_000),
    "deep groups": GrammarSpec("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "repetition": GrammarSpec("regex", "a{1000000}"),
    "repeated repetition": GrammarSpec("regex", "((a{1000}){1000}){1000}"),
    "deep schema": nested(200),
    "deeper schema": nested(2000),
    "optional properties": schema({"type": "object", "properties": properties}),
    "pattern": schema({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}),
    "patterns": schema({"allOf": [{"type": "string", "pattern": f"^.*{number}.*$"} for number in range(40)]}),
    "multiples": schema({"type": "integer", "multipleOf": 987654321}),
    "huge numbers": schema({"type": "number", "multipleOf": 1e-7, "minimum": -1e300, "maximum": 1e300}),
}


@pytest.mark.parametrize("spec", HOSTILE.values(), ids=HOSTILE)
def test_what_is_too_complex_is_refused_in_bounded_time(spec: GrammarSpec):
    started = time.perf_counter()
    with pytest.raises(RequestError):
        BYTE_LEVEL.grammars.constraint(spec)
    assert time.perf_counter() - started < BOUNDED_S


def test_what_becomes_too_complex_on_the_way_fails_then():
    """Each step is bounded, too; and it is the generation's fault, not the engine's."""
    constraint = BYTE_LEVEL.grammars.constraint(GrammarSpec("regex", "(.{1,300}|[a-z]{1,500}){1,500}"))
    rng, started = np.random.default_rng(0), time.perf_counter()

    def go_on() -> None:
        for _ in range(200):
            constraint.advance(int(rng.choice(np.flatnonzero(allowed(constraint)))))

    with pytest.raises(RequestError, match="guided_regex: lexer error: too many") as caught:
        go_on()
    assert caught.value.param == "guided_regex"
    assert time.perf_counter() - started < BOUNDED_S
    with pytest.raises(RequestError):
        constraint.allowed()


def test_a_token_that_does_not_fit_is_told_with_the_next_step():
    constraint = BYTE_LEVEL.grammars.constraint(GrammarSpec("choice", ("yes",)))
    constraint.advance(BYTE_LEVEL.tokenizer.token_to_id("n"))
    with pytest.raises(RequestError, match="guided_choice: "):
        constraint.allowed()


# Tokenizers


def test_a_tokenizer_of_another_kind_cannot_be_guided():
    with pytest.raises(UsageError, match="cannot be made to follow a grammar"):
        Grammars(Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).to_str(), 2, {1})


@pytest.mark.parametrize("ends", [(), (10_000,)])
def test_something_has_to_end_a_text(ends: tuple[int, ...]):
    with pytest.raises(UsageError):
        Grammars(BYTE_LEVEL.tokenizer.to_str(), BYTE_LEVEL.vocabulary, ends)


def test_fewer_logits_than_tokens():
    with pytest.raises(UsageError, match="vocab size too small"):
        Grammars(BYTE_LEVEL.tokenizer.to_str(), 100, BYTE_LEVEL.ends)
