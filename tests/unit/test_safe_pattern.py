"""Which regular expressions of clients are taken."""

from __future__ import annotations

import doctest
import re
import time

import pytest

from deployments import safe_pattern
from deployments.safe_pattern import complaint

TEXT = "a" * 400


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:the )?answer is:? (\w+)",
        r"####\s*(-?[\d,.]+)",
        r"\\boxed\{([^}]*)\}",
        r"(?P<answer>yes|no)\b",
        r"^[A-D]$",
        r"(?i:section): ([a-z]{1,20})",
        r"(ab|cd){1,3}x",
        r"x?y?z?",
    ],
)
def test_usual_ones_are_taken_and_quick(pattern: str):
    assert complaint(pattern) is None
    started = time.perf_counter()
    re.search(pattern, TEXT)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("(", "no regular expression"),
        ("a{5,2}", "no regular expression"),
        ("(a+)+$", "more than one character"),
        ("(a|aa)+$", "more than one character"),
        ("(?:ab)*", "more than one character"),
        (r"\w+\s+\w+", "3 parts"),
        (r"(a)\1", "refers back"),
        (r"(?=a)b", "looks around"),
        (r"(?<!a)b", "looks around"),
        ("(a?){30}a{30}", "too many ways"),
        ("((a{0,9}){0,9}){0,9}", "too many ways"),
        ("(?:x|a*){9}", "9 parts"),
        ("(?:a{0,1000}b{0,1000})", "too many ways"),
        ("(" * 300, "no regular expression"),
    ],
)
def test_those_that_may_take_ages_are_not(pattern: str, word: str):
    said = complaint(pattern)
    assert said is not None
    assert word in said


def test_the_examples_in_its_words():
    assert doctest.testmod(safe_pattern).failed == 0
