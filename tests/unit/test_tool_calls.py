"""Calls of tools read from texts, however those are cut into pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.tool_calls import AnyReader, ForcedReader, MarkedReader, Reader, ToolPlan, call_parts, whole_calls

CALL = '<tool_call>\n{"name": "size", "arguments": {"of": "fox"}}\n</tool_call>'
CUTS = st.lists(st.integers(1, 40), max_size=12)


def read(reader: Reader, text: str, cuts: list[int]) -> tuple[str, list[dict]]:
    """All that the reader finds in a text that comes in pieces of these sizes."""
    content, parts = "", []
    for size in cuts:
        piece, text = text[:size], text[size:]
        found = reader.read(piece, last=False)
        content, parts = content + found.content, parts + list(found.calls)
    found = reader.read(text, last=True)
    return content + found.content, whole_calls([*parts, *found.calls])


def bare(calls: list[dict]) -> list[tuple[str, str]]:
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@given(CUTS)
def test_calls_between_marks(cuts: list[int]):
    second = CALL.replace("size", "now").replace('{"of": "fox"}', "{}")
    content, calls = read(MarkedReader(), f"Well, <tool> then.{CALL}\n{second}", cuts)
    assert content == "Well, <tool> then."
    assert bare(calls) == [("size", '{"of":"fox"}'), ("now", "{}")]


@given(CUTS)
def test_a_last_call_need_not_be_closed(cuts: list[int]):
    content, calls = read(MarkedReader(), CALL.removesuffix("</tool_call>"), cuts)
    assert content == ""
    assert bare(calls) == [("size", '{"of":"fox"}')]


@given(
    st.sampled_from(
        [
            "no calls",
            "<tool_call",
            "a <tool_call>{}</tool_call> b",
            "<tool_call>not json</tool_call>",
            '<tool_call>{"name": 5}</tool_call>',
            "<tool_call>[1]",
            "</tool_call>",
            "",
        ]
    ),
    CUTS,
)
def test_what_is_no_call_stays_text(text: str, cuts: list[int]):
    reader = MarkedReader()
    assert read(reader, text, cuts) == (text, [])
    assert not reader.called


def test_words_are_not_held_back():
    assert MarkedReader().read("Hello <b>", last=False).content == "Hello <b>"
    assert MarkedReader().read("Hello <too", last=False).content == "Hello "


@given(CUTS)
def test_the_arguments_of_a_forced_call_come_as_they_are(cuts: list[int]):
    content, calls = read(ForcedReader("size"), '{"of": "fox"}', cuts)
    assert content == ""
    assert bare(calls) == [("size", '{"of": "fox"}')]


def test_a_forced_call_without_arguments():
    assert bare(read(ForcedReader("size"), "", [])[1]) == [("size", "")]


@given(CUTS)
def test_any_call(cuts: list[int]):
    text = json.dumps({"name": "size", "arguments": {"of": "ü"}})
    assert bare(read(AnyReader(), text, cuts)[1]) == [("size", '{"of":"ü"}')]
    assert read(AnyReader(), text[:-1], cuts) == (text[:-1], [])


def test_parts_of_a_stream():
    reader = ToolPlan(forced="size").reader()
    first, second = (reader.read(text, last=False).calls for text in ('{"of"', ": 1}"))
    [told] = call_parts(first)
    assert told == {
        "index": 0,
        "id": first[0].id,
        "type": "function",
        "function": {"name": "size", "arguments": '{"of"'},
    }
    assert call_parts(second) == [{"index": 0, "function": {"arguments": ": 1}"}}]


@pytest.mark.parametrize("plan", [ToolPlan(), ToolPlan(told=True)])
def test_without_marks_everything_is_text(plan: ToolPlan):
    assert read(plan.reader(), CALL, [5]) == (CALL, [])
