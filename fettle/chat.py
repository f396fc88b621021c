"""Messages of a conversation to the one text that the model was trained to continue, by the checkpoint's own template.

The text becomes ids without special tokens added, for the template has written them. Templates are Jinja in a sandbox,
set up as transformers sets them up, which a test compares; no other code of a checkpoint runs. A rendering is bounded
in time and in size, up to what one filter of Jinja's does in one call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import orjson
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fettle.errors import FamilyError, ModelError, RequestError, first_line
from fettle.schema import Strict

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

MOST_SECONDS = 2.0
MOST_CHARACTERS = 8_000_000
# Put at the end of a message that is to be continued: what the template writes after it is cut off.
HERE = "CONTINUE_FINAL_MESSAGE_TAG "
TICK = "_fettle_tick"
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", TICK}

Message = Mapping[str, object]


class ChatTemplate(Strict):
    """`source` is Jinja; `special_tokens` are the names that it knows beside the messages, such as `bos_token`."""

    source: str
    special_tokens: dict[str, str] = {}

    @classmethod
    def read(cls, directory: Path) -> ChatTemplate | None:
        """The template in a directory that transformers wrote a tokenizer to; None where there is none.

        Raises:
            FamilyError: the tokenizer's configuration is not JSON.
        """
        config: dict[str, Any] = {}
        if (directory / CONFIG_FILE).is_file():
            try:
                config = orjson.loads((directory / CONFIG_FILE).read_bytes())
            except orjson.JSONDecodeError as error:
                raise FamilyError(f"{directory / CONFIG_FILE}: not valid JSON ({error}); restore it") from None
        source = config.get("chat_template")
        if isinstance(source, list):
            source = {each["name"]: each["template"] for each in source}.get("default")
        if (directory / TEMPLATE_FILE).is_file():
            source = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
        if source is None:
            return None
        found = {name: config[name] for name in SPECIAL_NAMES if config.get(name) is not None}
        contents = {name: value["content"] if isinstance(value, dict) else value for name, value in found.items()}
        return cls(source=source, special_tokens=contents)

    def files(self) -> dict[str, bytes]:
        """What has to be in a directory, by name, for `read` to find this template there."""
        config = orjson.dumps(self.special_tokens, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
        return {TEMPLATE_FILE: self.source.encode(), CONFIG_FILE: config}


class Chat:
    """A template ready to render."""

    def __init__(self, template: ChatTemplate) -> None:
        """Compile the template.

        Raises:
            ModelError: it is not Jinja.
        """
        self.source = template.source
        self._names = template.special_tokens
        try:
            self._template = _compiled(template.source)
        except TemplateError as error:
            raise ModelError(f"the chat template does not compile ({first_line(error)}); mend it") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        open_answer: bool = True,
        continue_last: bool = False,
        settings: Mapping[str, object] | None = None,
    ) -> str:
        """The text to continue.

        Args:
            messages: each with a role and content; what is None in one counts as absent.
            tools: JSON schemas of what the model may call.
            documents: what an answer may quote, each with a title and a text, for templates that know them.
            open_answer: end with the beginning of an assistant's message.
            continue_last: end within the last message instead, right after its content, which is a string.
            settings: whatever else the template reads, such as `enable_thinking`.

        Raises:
            RequestError: the template refuses these messages, does not find in them what it needs, or takes too long.
        """
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if continue_last:
            given[-1]["content"] = f"{given[-1]['content']}{HERE}"
        for name in RESERVED & set(settings or ()):
            raise RequestError(f"{name}: is the template's own; give it no other meaning", param=name)
        variables = {
            **self._names,
            **(settings or {}),
            "messages": given,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": open_answer and not continue_last,
        }
        text = self._rendered(variables)
        return _up_to_here(text) if continue_last else text

    def _rendered(self, variables: Mapping[str, object]) -> str:
        bound = _Bound()
        try:
            return "".join(map(bound.counted, self._template.generate({**variables, TICK: bound.tick})))
        # What a template does with messages that it was not made for is the request's fault, whatever it is.
        except Exception as error:
            raise RequestError(
                f"the model's chat template does not take these messages: {first_line(error)}", param="messages"
            ) from error


class _Bound:
    """What one rendering may take."""

    def __init__(self) -> None:
        self._end = time.monotonic() + MOST_SECONDS
        self._left = MOST_CHARACTERS

    def tick(self) -> None:
        if time.monotonic() > self._end:
            raise TemplateError(f"it takes longer than {MOST_SECONDS:g} s")

    def counted(self, piece: str) -> str:
        self._left -= len(piece)
        if self._left < 0:
            raise TemplateError(f"it writes more than {MOST_CHARACTERS} characters")
        return piece


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox bounds `range`; this one also what `*` and `**` make of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 1_000_000 and abs(right) <= 64):
            raise TemplateError("it raises to too high a power")
        for many, times in ((left, right), (right, left)):
            if hasattr(many, "__len__") and isinstance(times, int) and len(many) * times > MOST_CHARACTERS:
                raise TemplateError(f"it writes more than {MOST_CHARACTERS} characters")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only stands for what is in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def _compiled(source: str) -> Template:
    """The template, with a look at the clock wherever it could go round."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    tree = environment.parse(source)
    bodies = [block.body for block in tree.find_all(nodes.For)] + [block.body for block in tree.find_all(nodes.Macro)]
    for body in bodies:
        look = nodes.ExprStmt(nodes.Call(nodes.Name(TICK, "load"), [], [], None, None))
        body.insert(0, look.set_lineno(1))
    return environment.from_string(tree)


def _up_to_here(text: str) -> str:
    """Without what the template wrote after the last message, whose end may have been trimmed."""
    mark = HERE.strip()
    place = text.rfind(mark)
    if place < 0:
        raise RequestError(
            "continue_final_message: the model's chat template does not show the last message as it is; leave it false",
            param="continue_final_message",
        )
    before = text[:place]
    return before if text.startswith(HERE, place) else before.rstrip()


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
