"""Calls of tools in generated texts: which grammar forces one, and reading them from the text as it comes.

A tool that has to be called is a JSON schema that the text has to keep, so that works with every model. Whether a model
calls one of its own accord, and how it writes that, is its template's: read are calls as JSON between `<tool_call>` and
`</tool_call>` (Hermes, Qwen, SmolLM and others), if the template writes them so. Other ways stay in the text.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from deployments.text_schemas import ChatRequest, Tool, ToolChoice
from fettle.errors import RequestError
from fettle.generation import GrammarSpec

OPENING, CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class CallPart:
    """A part of call number `index`; its first one has the id and the name, all arguments follow each other."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """What a text turned out to hold: words for the reader, and calls."""

    content: str = ""
    calls: tuple[CallPart, ...] = ()


class Reader(Protocol):
    """Reads one choice. `called`: whether there was a call so far."""

    called: bool

    def read(self, text: str, *, last: bool) -> Read:
        """The next text, and whether it is the last."""
        ...


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a request's tools are used: told to the template or not, forced by a grammar or not, and read how."""

    told: bool = False
    grammar: GrammarSpec | None = None
    forced: str | None = None
    any_forced: bool = False
    marked: bool = False

    def reader(self) -> Reader:
        """A new one for each choice."""
        if self.forced is not None:
            return ForcedReader(self.forced)
        if self.any_forced:
            return AnyReader()
        return MarkedReader() if self.marked else PlainReader()


def plan_tools(body: ChatRequest, template: str) -> ToolPlan:
    """Raises RequestError for a choice of tools that are not there."""
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none" or (not tools and choice in (None, "auto")):
        return ToolPlan()
    if not tools:
        raise RequestError("tool_choice: there are no tools to call; send them as `tools`", param="tool_choice")
    if isinstance(choice, ToolChoice):
        name = choice.function.name
        tool = next((tool for tool in tools if tool.function.name == name), None)
        if tool is None:
            raise RequestError(f"tool_choice: {name!r} is not among the tools; add it", param="tool_choice")
        return ToolPlan(told=True, grammar=_grammar(_parameters(tool)), forced=name)
    if choice == "required":
        schemas = [_call_schema(tool) for tool in tools]
        return ToolPlan(
            told=True, grammar=_grammar(schemas[0] if len(schemas) == 1 else {"anyOf": schemas}), any_forced=True
        )
    return ToolPlan(told=True, marked=OPENING in template)


class PlainReader:
    """No calls: the text is the content."""

    called = False

    def read(self, text: str, *, last: bool) -> Read:  # noqa: ARG002, nothing is held back
        return Read(text)


class ForcedReader:
    """The text is the arguments of one known call."""

    def __init__(self, name: str) -> None:
        self.called = False
        self._name = name

    def read(self, text: str, *, last: bool) -> Read:
        if self.called:
            return Read(calls=(CallPart(0, text),)) if text else Read()
        if not text and not last:
            return Read()
        self.called = True
        return Read(calls=(CallPart(0, text, new_id(), self._name),))


class AnyReader:
    """The text is one call, name and arguments; known when it is complete."""

    def __init__(self) -> None:
        self.called = False
        self._text = ""

    def read(self, text: str, *, last: bool) -> Read:
        self._text += text
        if not last:
            return Read()
        call = _call_of(self._text, 0)
        self.called = call is not None
        return Read(self._text) if call is None else Read(calls=(call,))


class MarkedReader:
    """Calls stand between marks, after or among other words. What looks like one and is none stays content."""

    def __init__(self) -> None:
        self.called = False
        self._held = ""
        self._inside = False
        self._after_call = False
        self._calls = 0

    def read(self, text: str, *, last: bool) -> Read:
        self._held += text
        content: list[str] = []
        calls: list[CallPart] = []
        while (mark := CLOSING if self._inside else OPENING) in self._held:
            before, _, self._held = self._held.partition(mark)
            self._take(before, CLOSING, content, calls)
            self._inside = not self._inside
        if last:
            self._take(self._held, "", content, calls)
            self._held = ""
        elif not self._inside:
            said = len(self._held) - _may_begin(OPENING, self._held)
            self._say(self._held[:said], content)
            self._held = self._held[said:]
        return Read("".join(content), tuple(calls))

    def _take(self, text: str, end: str, content: list[str], calls: list[CallPart]) -> None:
        call = _call_of(text, self._calls) if self._inside else None
        if call is not None:
            self.called = self._after_call = True
            self._calls += 1
            calls.append(call)
        else:
            self._say(f"{OPENING}{text}{end}" if self._inside else text, content)

    def _say(self, text: str, content: list[str]) -> None:
        # Between calls there are line ends, which say nothing.
        text = text.lstrip() if self._after_call else text
        if text:
            self._after_call = False
            content.append(text)


def new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _call_of(text: str, index: int) -> CallPart | None:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    written = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    return CallPart(index, written, new_id(), found["name"])


def _may_begin(mark: str, text: str) -> int:
    """How many of the last characters may be the beginning of the mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _call_schema(tool: Tool) -> dict[str, Any]:
    properties = {"name": {"const": tool.function.name}, "arguments": _parameters(tool)}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _grammar(schema: dict[str, Any]) -> GrammarSpec:
    return GrammarSpec("json_schema", orjson.dumps(schema).decode())


def call_parts(parts: Sequence[CallPart]) -> list[dict[str, Any]]:
    """As the deltas of a stream have them."""
    return [
        {
            "index": part.index,
            **({} if part.id is None else {"id": part.id, "type": "function"}),
            "function": {**({} if part.name is None else {"name": part.name}), "arguments": part.arguments},
        }
        for part in parts
    ]


def whole_calls(parts: Sequence[CallPart]) -> list[dict[str, Any]]:
    """As a whole message has them."""
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        if part.id is not None:
            function = {"name": part.name, "arguments": ""}
            calls[part.index] = {"id": part.id, "type": "function", "function": function}
        calls[part.index]["function"]["arguments"] += part.arguments
    return list(calls.values())
