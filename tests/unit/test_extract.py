"""Answers out of generated texts, and when two texts disagree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fettle.errors import UsageError
from fettle.extract import (
    Answer,
    AnswerSpec,
    FunctionAnswer,
    LabelAnswer,
    PatternAnswer,
    TextAnswer,
    disagreements,
    extractor,
    loss_in_words,
)

SECTIONS = ["python", "gnu-r", "r", "web", "libs", "libdevel", "c++"]


def label_in(text: str, match: str = "first") -> str | None:
    answer = extractor(LabelAnswer(labels=SECTIONS, match=match))(text)
    return answer.value if answer.found else None


def test_the_text_itself_counts_to_the_last_blank():
    exact = extractor(TextAnswer())
    assert exact("yes") == exact("yes")
    assert exact("yes") != exact("yes ")
    assert exact("yes") != exact("Yes")


def test_a_normalised_text_ignores_case_white_space_and_compatibility_forms():
    loose = extractor(TextAnswer(normalize=True))
    assert loose(" The  ﬁle\n") == loose("the file")
    assert loose("the file") != loose("the files")


@pytest.mark.parametrize(
    ("pattern", "take", "text", "value"),
    [
        (r"\d+", "first", "12 of 30", "12"),
        (r"\d+", "last", "12 of 30", "30"),
        (r"answer: (\w+), (\w+)", "first", "answer: red, blue", "red"),
        (r"(\w+) is (?P<answer>\w+)", "first", "sky is blue", "blue"),
        (r"x(y)?", "first", "x xy", "y"),
        (r"a*", "first", "bbb", ""),
    ],
)
def test_a_pattern_takes_its_group(pattern: str, take: str, text: str, value: str):
    assert extractor(PatternAnswer(pattern=pattern, take=take))(text) == Answer(value)


def test_a_pattern_that_does_not_match_gives_the_whole_text_and_says_so():
    number = extractor(PatternAnswer(pattern=r"\d+"))
    assert number("none") == Answer("none", found=False)
    assert number("7") != Answer("7", found=False)
    normalised = extractor(PatternAnswer(pattern=r"is (.*)", normalize=True))
    assert normalised("is BLUE ") == normalised("it is  blue")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("python", "python"),
        ("The section is Python.", "python"),
        ("libdevel, not libs", "libdevel"),
        ("libsomething", None),
        ("gnu-r", "gnu-r"),
        ("an r package", "r"),
        ("web then python", "web"),
        ("in c++11", "c++"),
        ("", None),
    ],
)
def test_the_first_label_that_occurs_as_a_word(text: str, label: str | None):
    assert label_in(text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Python. ", "python"),
        ('"gnu-r"', "gnu-r"),
        ("the python", None),
        ("**WEB**", "web"),
        ("c++", "c++"),
        (".", None),
    ],
)
def test_a_label_that_is_the_whole_text(text: str, label: str | None):
    assert label_in(text, "equal") == label


@given(st.sampled_from(SECTIONS), st.text(alphabet=" .,;\n", max_size=6), st.text(alphabet=" .,;\n", max_size=6))
def test_a_label_is_found_in_any_punctuation_by_both_rules(label: str, before: str, after: str):
    assert label_in(before + label + after) == label
    assert label_in(before + label.upper() + after, "equal") == label


def test_the_users_function_decides():
    spec = FunctionAnswer(function="mine.answers:total")
    total = extractor(spec, lambda text: sum(map(int, text.split())) if text else None)
    assert total("1 2 3") == total("6") == Answer("6")
    assert total("") == Answer("", found=False)
    with pytest.raises(UsageError, match=r"mine\.answers:total"):
        extractor(spec)
    with pytest.raises(UsageError, match="list"):
        extractor(spec, str.split)("a b")


def test_texts_without_an_answer_agree_only_if_they_are_equal():
    labels = extractor(LabelAnswer(labels=SECTIONS))
    texts = ["python", "it is web", "dunno", "dunno", "libs", "dunno"]
    reference = ["Python!", "libs", "dunno", "no idea", "dunno", "web"]
    assert disagreements(texts, reference, labels).tolist() == [False, True, False, True, True, True]


def test_texts_and_reference_must_pair_up():
    with pytest.raises(ValueError, match="zip"):
        disagreements(["a"], ["a", "b"], extractor(TextAnswer()))


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "pattern", "pattern": "("},
        {"kind": "labels", "labels": []},
        {"kind": "labels", "labels": ["Yes", "yes"]},
        {"kind": "labels", "labels": ["yes", "yes."], "match": "equal"},
        {"kind": "labels", "labels": ["..."], "match": "equal"},
        {"kind": "labels", "labels": ["  "]},
        {"kind": "function", "function": "os.system"},
        {"kind": "text", "pattern": "x"},
        {"kind": "other"},
    ],
)
def test_what_makes_no_sense_is_refused(content: dict[str, object]):
    with pytest.raises(ValidationError):
        TypeAdapter(AnswerSpec).validate_python(content)


@pytest.mark.parametrize(
    "spec",
    [
        TextAnswer(),
        PatternAnswer(pattern=r"\d+", take="last"),
        LabelAnswer(labels=SECTIONS),
        FunctionAnswer(function="a.b:c"),
    ],
)
def test_every_kind_survives_the_manifest_and_has_words(spec: AnswerSpec):
    adapter = TypeAdapter(AnswerSpec)
    assert adapter.validate_json(adapter.dump_json(spec)) == spec
    assert loss_in_words(spec).startswith("another")
