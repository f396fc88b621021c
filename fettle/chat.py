"""Messages of a conversation to the one text that the model was trained to continue, by the checkpoint's own template.

The text becomes ids without special tokens added, for the template has written them. Templates are Jinja in a sandbox,
set up as transformers sets them up, which a test compares; no other code of a checkpoint runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fettle.errors import ModelError, RequestError, first_line
from fettle.schema import Strict

Message = Mapping[str, object]


class ChatTemplate(Strict):
    """`source` is Jinja; `special_tokens` are the names that it knows beside the messages, such as `bos_token`."""

    source: str
    special_tokens: dict[str, str] = {}


class Chat:
    def __init__(self, template: ChatTemplate) -> None:
        """Compile the template.

        Raises:
            ModelError: it is not Jinja.
        """
        self._names = template.special_tokens
        try:
            self._template = _environment().from_string(template.source)
        except TemplateError as error:
            raise ModelError(f"the chat template does not compile ({first_line(error)}); mend it") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        open_answer: bool = True,
        settings: Mapping[str, object] | None = None,
    ) -> str:
        """The text to continue.

        Args:
            messages: each with a role and content; what is None in one counts as absent.
            tools: JSON schemas of what the model may call.
            open_answer: end with the beginning of an assistant's message.
            settings: whatever else the template reads, such as `enable_thinking`.

        Raises:
            RequestError: the template refuses these messages, or does not find in them what it needs.
        """
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        names = {**self._names, **(settings or {})}
        try:
            return self._template.render(messages=given, tools=tools, add_generation_prompt=open_answer, **names)
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(
                f"the model's chat template does not take these messages: {first_line(error)}", param="messages"
            ) from error


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only stands for what is in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes what HTML must not hold.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
