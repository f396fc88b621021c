"""From a generated text to the answer in it, and from two texts to a disagreement. Pure functions over strings.

What counts as the answer is the user's to say and stands in the manifest: the text itself, what a regular expression
finds, one of a set of labels, or what a function of the user's returns. Whoever compares texts (optimize, the monitor,
votes) compares answers from here. Importing the user's function is `optimize`'s business.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, field_validator, model_validator

from fettle.errors import UsageError
from fettle.schema import Strict

# What people and models put around a single word.
SURROUNDINGS: Final = " \t\n.,;:!?\"'`*_()[]{}<>«»“”‘’„"
ANSWER_GROUP: Final = "answer"


class TextAnswer(Strict):
    """The whole text is the answer. `normalize`: case, white space and Unicode's ways to write a sign do not count."""

    kind: Literal["text"] = "text"
    normalize: bool = False


class PatternAnswer(Strict):
    """What a regular expression finds: its group named `answer`, else its first group, else the whole match."""

    kind: Literal["pattern"] = "pattern"
    pattern: str
    take: Literal["first", "last"] = Field(default="first", description="of several matches in one text")
    normalize: bool = False

    @field_validator("pattern")
    @classmethod
    def compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class LabelAnswer(Strict):
    """One of these labels; case and white space do not count.

    `first`: the one that occurs first in the text as a word of its own, the longest of several at one place. `equal`:
    the one that is the whole text, but for punctuation around it.
    """

    kind: Literal["labels"] = "labels"
    labels: list[Annotated[str, StringConstraints(min_length=1)]] = Field(min_length=1)
    match: Literal["first", "equal"] = "first"

    @model_validator(mode="after")
    def distinct(self) -> LabelAnswer:
        seen: dict[str, str] = {}
        for label in self.labels:
            key = _bare(label) if self.match == "equal" else normalized(label)
            if not key:
                raise ValueError(f"label {label!r} has no letter or digit to find it by")
            if key in seen:
                raise ValueError(f"labels {seen[key]!r} and {label!r} differ only in what does not count")
            seen[key] = label
        return self


class FunctionAnswer(Strict):
    """What the user's own function `module:name` returns for a text: a string, a number, or None for no answer."""

    kind: Literal["function"] = "function"
    function: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


AnswerSpec = Annotated[TextAnswer | PatternAnswer | LabelAnswer | FunctionAnswer, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is compared. Where the text has no answer in it, `found` is false and `value` the whole text.

    So two texts without an answer agree only if they are the same text: a pattern that never matches makes nothing
    look alike.
    """

    value: str
    found: bool = True


Extract = Callable[[str], Answer]
UserFunction = Callable[[str], object]


def extractor(spec: AnswerSpec, function: UserFunction | None = None) -> Extract:
    """The function from a text to its answer.

    Args:
        function: the user's own, imported already, where the specification names one.

    Raises:
        UsageError: the specification names a function and none is given; or later, it returned what is no answer.
    """
    match spec:
        case TextAnswer(normalize=normalize):
            return lambda text: Answer(normalized(text) if normalize else text)
        case PatternAnswer():
            return _by_pattern(spec)
        case LabelAnswer(match="equal"):
            return _by_equality(spec.labels)
        case LabelAnswer():
            return _by_occurrence(spec.labels)
        case FunctionAnswer(function=name):
            if function is None:
                raise UsageError(f"answers are extracted by {name}, which is not imported here")
            return _by_function(name, function)


def disagreements(texts: Sequence[str], reference: Sequence[str], extract: Extract) -> NDArray[np.bool_]:
    """Which texts hold another answer than the reference's: bool [texts]."""
    pairs = zip(texts, reference, strict=True)
    return np.array([extract(text) != extract(other) for text, other in pairs], np.bool_)


def loss_in_words(spec: AnswerSpec) -> str:
    match spec:
        case TextAnswer(normalize=normalize):
            return "another text" + (", but for case and white space" if normalize else "")
        case PatternAnswer(pattern=pattern):
            return f"another {'last' if spec.take == 'last' else 'first'} match of {pattern}"
        case LabelAnswer(labels=labels):
            return f"another one of {len(labels)} labels"
        case FunctionAnswer(function=function):
            return f"another result of {function}"


def normalized(text: str) -> str:
    """Compatibility forms of Unicode made one, case folded, white space to single blanks, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _bare(text: str) -> str:
    return normalized(text).strip(SURROUNDINGS)


def _by_pattern(spec: PatternAnswer) -> Extract:
    expression = re.compile(spec.pattern)
    group: int | str = ANSWER_GROUP if ANSWER_GROUP in expression.groupindex else min(1, expression.groups)

    def extract(text: str) -> Answer:
        found = [match[group] for match in expression.finditer(text) if match[group] is not None]
        if not found:
            return Answer(text, found=False)
        value = found[-1 if spec.take == "last" else 0]
        return Answer(normalized(value) if spec.normalize else value)

    return extract


def _by_equality(labels: Sequence[str]) -> Extract:
    known = {_bare(label): label for label in labels}

    def extract(text: str) -> Answer:
        label = known.get(_bare(text))
        return Answer(text, found=False) if label is None else Answer(label)

    return extract


def _by_occurrence(labels: Sequence[str]) -> Extract:
    known = {normalized(label): label for label in labels}
    # The longest first, since alternatives are tried in order.
    ordered = sorted(known, key=lambda label: (-len(label), label))
    expression = re.compile("|".join(_as_word(label) for label in ordered))

    def extract(text: str) -> Answer:
        match = expression.search(normalized(text))
        return Answer(text, found=False) if match is None else Answer(known[match[0]])

    return extract


def _as_word(label: str) -> str:
    """The label where no letter or digit goes on at either end; "c++" ends in none, so anything may follow it."""
    before = r"(?<!\w)" if re.match(r"\w", label[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", label[-1]) else ""
    return f"{before}{re.escape(label)}{after}"


def _by_function(name: str, function: UserFunction) -> Extract:
    def extract(text: str) -> Answer:
        value = function(text)
        if value is None:
            return Answer(text, found=False)
        if isinstance(value, str | int | float):
            return Answer(str(value))
        raise UsageError(f"{name} returned {type(value).__name__}; give back a string, a number, or None for no answer")

    return extract
