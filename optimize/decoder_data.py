"""The user's rows as prompts for a language model, and prompts and answers as token ids.

A row says in one of three ways what the model is asked:

- `{"messages": [...]}` is a conversation, rendered by the model's chat template, as `/v1/chat/completions` does. What
  the assistant says last, if it has the last word, is the row's answer.
- `{"prompt": "..."}` is continued as it stands, as `/v1/completions` does. (A list of messages counts as the former.)
- `{"text": "..."}` is what a user says: one message, or the prompt itself where the model has no chat template. An
  instruction with `{text}` in it (or any other column) is filled in first, which makes prompts of classified texts.

An answer is optional, in the column `answer`, `completion` or that of the labels. Training and figures against what
is right use it; certificates compare with the reference alone. Rows that are useless are dropped and counted, as
`optimize.data` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from fettle.chat import Chat, Message
from fettle.config import DataFiles
from fettle.errors import DataError, RequestError
from fettle.instruction import Instruction
from optimize.data import Table, not_a_text, raise_if_broken, records

ANSWER_COLUMNS: Final = ("answer", "completion")

Record = Mapping[str, Any]
Ids = NDArray[np.int32]


class Form(StrEnum):
    """In which of the ways the rows are given."""

    MESSAGES = "messages"
    PROMPT = "prompt"
    TEXT = "text"


@dataclass
class PromptReader:
    """Reads files of one form into tables of prompts (see the module); pass it to `optimize.data.load_splits`.

    `form` is known after the first file, which decides it for all.
    """

    chat: Chat | None
    instruction: Instruction | None = None
    form: Form | None = field(default=None, init=False)
    _form_of: Path | None = field(default=None, init=False)

    def __call__(self, path: Path, files: DataFiles) -> Table:
        """One file's prompts, and their answers as strings, None where a row has none.

        Raises:
            DataError: unreadable, of another form than the files before, or with rows that are broken.
        """
        rows = list(records(path))
        if not rows:
            raise DataError(f"{path}: no rows")
        self._decide(path, files, {column for _, record in rows for column in record}, rows[0][1])
        prompts: list[Any] = []
        answers: list[str | None] = []
        broken: list[tuple[int, str]] = []
        empty = 0
        for line, record in rows:
            try:
                row = self._row(record, files)
            except (DataError, RequestError) as error:
                broken.append((line, error.message))
                continue
            if row is None:
                empty += 1
            else:
                prompts.append(row[0])
                answers.append(row[1])
        raise_if_broken(path, broken)
        return Table(prompts, answers if any(answer is not None for answer in answers) else None, empty)

    @property
    def special(self) -> bool:
        """Whether the tokenizer adds its special tokens to a prompt: not where the template has written them."""
        return self.chat is None or self.form is Form.PROMPT

    @property
    def warning(self) -> str | None:
        """What the user should know about how the rows were read."""
        if self.form is Form.PROMPT and self.chat is not None:
            return (
                "the prompts are continued as they stand, as /v1/completions does, though the model has a chat "
                "template; for chat name the column 'text', or give 'messages'"
            )
        return None

    def _decide(self, path: Path, files: DataFiles, columns: set[str], first: Record) -> None:
        form = self._form(path, files, columns, first)
        if self.form is not None and form is not self.form:
            raise DataError(f"{path} has its rows as {form}, {self._form_of} as {self.form}; give all in one form")
        if form is Form.MESSAGES and self.chat is None:
            raise DataError(f"{path}: rows are messages, but the model has no chat template; give them as 'prompt'")
        self.form, self._form_of = form, path

    def _form(self, path: Path, files: DataFiles, columns: set[str], first: Record) -> Form:
        if self.instruction is not None:
            present = columns | ({"text"} if files.text_column in columns else set())
            for name in self.instruction.columns:
                if name not in present:
                    raise DataError(f"{path}: no column {name!r}, which the prompt names; it has {_listed(columns)}")
        if "label_column" in files.model_fields_set and files.label_column not in columns:
            raise DataError(f"{path}: no column {files.label_column!r} for the label; it has {_listed(columns)}")
        if self.instruction is not None:
            return Form.TEXT
        if "messages" in columns or isinstance(first.get("prompt"), list):
            return Form.MESSAGES
        if "prompt" in columns:
            return Form.PROMPT
        if files.text_column not in columns:
            raise DataError(
                f"{path}: no column 'messages', 'prompt' or {files.text_column!r}; it has {_listed(columns)} "
                "(choose one with --text-column, or fill a prompt from columns with --prompt)"
            )
        return Form.TEXT

    def _row(self, record: Record, files: DataFiles) -> tuple[str, str | None] | None:
        """Prompt and answer, or None for a row without a text."""
        answer = _answer(record, files)
        match self.form:
            case Form.MESSAGES:
                messages = _messages(record["messages"] if "messages" in record else record.get("prompt"))
                if not messages:
                    return None
                if messages[-1].get("role") == "assistant":
                    answer = _text(messages[-1].get("content")) if answer is None else answer
                    messages = messages[:-1]
                return (self._render(messages), answer) if messages else None
            case Form.PROMPT:
                prompt = _text(record.get("prompt"))
                return None if prompt is None else (prompt, answer)
            case _:
                text = self._filled(record, files)
                if text is None:
                    return None
                return (self._render([{"role": "user", "content": text}]) if self.chat else text), answer

    def _filled(self, record: Record, files: DataFiles) -> str | None:
        named = {**record, "text": record.get(files.text_column, record.get("text"))}
        if self.instruction is None:
            return _text(named["text"])
        values = {name: _text(_written(named.get(name))) for name in self.instruction.columns}
        return None if None in values.values() else self.instruction.fill(values)

    def _render(self, messages: Sequence[Message]) -> str:
        assert self.chat is not None
        return self.chat.render(messages)


class Prompts:
    """Prompts and answers to token ids, as the server makes them."""

    def __init__(self, tokenizer_json: bytes, *, special: bool, context: int) -> None:
        """`special` as `PromptReader.special` says; `context`: tokens of a prompt and its answer together, at most."""
        self._fast = FastTokenizer.from_str(tokenizer_json.decode())
        self.special, self.context = special, context

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """int32 [tokens] of each prompt, never cut."""
        return self._encoded(texts, self.special)

    def encode_answers(self, texts: Sequence[str]) -> list[Ids]:
        """int32 [tokens] of each answer: what follows a prompt, without an end token."""
        return self._encoded(texts, special=False)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of an answer's ids, special tokens left out."""
        text: str = self._fast.decode([int(index) for index in ids], skip_special_tokens=True)
        return text

    def fitting(self, prompts: Sequence[Ids], answer_tokens: int) -> list[int]:
        """Which prompts leave room for so many tokens of an answer; the others cannot be measured or trained on."""
        return [row for row, ids in enumerate(prompts) if 0 < len(ids) <= self.context - answer_tokens]

    def _encoded(self, texts: Sequence[str], special: bool) -> list[Ids]:
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=special)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _answer(record: Record, files: DataFiles) -> str | None:
    for column in (*ANSWER_COLUMNS, files.label_column):
        value = record.get(column)
        if isinstance(value, list) and value and isinstance(value[-1], Mapping):
            # A completion as a conversation goes on.
            value = value[-1].get("content")
        if value is not None and value != "":
            return _text(_written(value), f"the {column}")
    return None


def _written(value: Any) -> Any:
    """A number as it is written."""
    return str(value) if isinstance(value, int | float) else value


def _messages(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(message, dict) and "role" in message for message in value):
        raise DataError("the messages are no list of objects with a role")
    for message in value:
        content = message.get("content")
        if isinstance(content, str):
            _text(content, "a message")
    return value


def _text(value: Any, what: str = "the text") -> str | None:
    """A usable string, None for no value or a blank one."""
    wrong = not_a_text(value)
    if wrong is not None:
        raise DataError(wrong.replace("the text", what, 1))
    return value if value and value.strip() else None


def _listed(columns: set[str]) -> str:
    return ", ".join(sorted(columns))
