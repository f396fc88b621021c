"""Whether a client's regular expression may be searched for in texts: Python's engine goes back, with some for ages.

An expression is taken if the ways that it can match from one place are few: a polynomial of low degree in the length of
the text, with a small factor. What repeats without end must be one character or class, and there may be two of those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Python's own parser of regular expressions; these are its names since 3.11.
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MOST_ENDLESS = 2
MOST_WAYS = 1000
REPEATS = {codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT}
SINGLE = {codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.AT}

# The degree of the polynomial, and its factor.
Ways = tuple[int, int]


def complaint(pattern: str) -> str | None:
    """What is wrong with an expression, or None.

    >>> complaint(r"answer is:? (\\w+)")
    >>> complaint(r"(a+)+")
    'something that repeats without end repeats more than one character'
    """
    try:
        re.compile(pattern)
        endless, ways = _of_sequence(parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no regular expression ({error})"
    except _UnboundedError as error:
        return str(error)
    if endless > MOST_ENDLESS:
        return f"{endless} parts repeat without end, the limit is {MOST_ENDLESS}"
    if ways > MOST_WAYS:
        return f"it can match in too many ways (over {MOST_WAYS})"
    return None


class _UnboundedError(Exception):
    """No such polynomial is known."""


def _of_sequence(items: Iterable[tuple[Any, Any]]) -> Ways:
    degree, factor = 0, 1
    for code, argument in items:
        own_degree, own_factor = _of_item(code, argument)
        degree, factor = degree + own_degree, min(factor * own_factor, MOST_WAYS + 1)
    return degree, factor


def _of_item(code: Any, argument: Any) -> Ways:
    if code in SINGLE:
        return 0, 1
    if code in REPEATS:
        least, most, body = argument
        return _of_repeat(least, most, body)
    if code is codes.SUBPATTERN:
        return _of_sequence(argument[3])
    if code is codes.ATOMIC_GROUP:
        return _of_sequence(argument)
    if code is codes.BRANCH:
        branches = [_of_sequence(branch) for branch in argument[1]]
        return max(degree for degree, _ in branches), sum(factor for _, factor in branches)
    raise _UnboundedError("it looks around or refers back")


def _of_repeat(least: int, most: Any, body: Any) -> Ways:
    degree, factor = _of_sequence(body)
    if most is codes.MAXREPEAT:
        if len(body) != 1 or body[0][0] not in SINGLE:
            raise _UnboundedError("something that repeats without end repeats more than one character")
        return 1, 1
    most = min(int(most), MOST_WAYS + 1)
    copies = most - min(least, most) + 1
    return degree * most, min(copies * factor ** min(most, 64), MOST_WAYS + 1)
