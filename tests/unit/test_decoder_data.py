"""Rows of every form as prompts, instructions, and prompts as token ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import processors

from fettle.chat import Chat, ChatTemplate
from fettle.config import DataFiles
from fettle.errors import DataError, UsageError
from optimize.data import Table, load_splits
from optimize.decoder_data import Form, Instruction, PromptReader, Prompts
from tests.unit import tiny_decoders

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = Chat(ChatTemplate(source=TEMPLATE))
USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path: Path, *rows: object, chat: Chat | None = CHAT, prompt: str | None = None, **columns: str) -> Table:
    path = written(tmp_path / "rows.jsonl", *rows)
    reader = PromptReader(chat, None if prompt is None else Instruction(prompt))
    return reader(path, DataFiles(data=path, **columns))


def test_a_conversation_is_rendered_and_its_last_reply_is_the_answer(tmp_path: Path):
    table = read(
        tmp_path,
        {"messages": [USER, REPLY, {"role": "user", "content": "more"}]},
        {"messages": [USER, REPLY]},
        {"messages": [USER, REPLY], "answer": "other"},
        {"messages": []},
        {"messages": [REPLY]},
    )
    assert table.texts == [
        "<user>hi<assistant>hello<user>more<assistant>",
        "<user>hi<assistant>",
        "<user>hi<assistant>",
    ]
    assert table.labels == [None, "hello", "other"]
    assert table.empty == 2


def test_a_prompt_as_a_list_is_a_conversation_and_so_is_its_completion(tmp_path: Path):
    table = read(tmp_path, {"prompt": [USER], "completion": [REPLY]})
    assert (table.texts, table.labels) == (["<user>hi<assistant>"], ["hello"])


@pytest.mark.parametrize("chat", [CHAT, None])
def test_a_prompt_stands_as_it_is(tmp_path: Path, chat: Chat | None):
    table = read(tmp_path, {"prompt": "Once ", "completion": "upon"}, {"prompt": " "}, {"prompt": None}, chat=chat)
    assert (table.texts, table.labels, table.empty) == (["Once "], ["upon"], 2)


@pytest.mark.parametrize(("chat", "expected"), [(CHAT, "<user>word<assistant>"), (None, "word")])
def test_a_text_is_what_the_user_says(tmp_path: Path, chat: Chat | None, expected: str):
    table = read(tmp_path, {"text": "word", "label": 3}, chat=chat)
    assert (table.texts, table.labels) == ([expected], ["3"])


def test_an_instruction_makes_a_prompt_of_a_text(tmp_path: Path):
    table = read(
        tmp_path,
        {"text": "a {b} c", "label": "games", "prompt": "unused"},
        {"text": "", "label": "games"},
        prompt=r"Which section?\n{text}",
    )
    assert table.texts == ["<user>Which section?\na {b} c<assistant>"]
    assert (table.labels, table.empty) == (["games"], 1)


def test_an_instruction_may_name_any_column(tmp_path: Path):
    table = read(tmp_path, {"body": "x", "to": "fr"}, prompt="{text} in {to}", text_column="body", chat=None)
    assert table.texts == ["x in fr"]
    table = read(tmp_path, {"text": "x", "n": 5}, prompt="{n} times {text}", chat=None)
    assert table.texts == ["5 times x"]
    table = read(tmp_path, {"question": "why?"}, prompt="Q: {question}", chat=None)
    assert table.texts == ["Q: why?"]


def test_an_instruction_without_a_place_is_refused():
    with pytest.raises(UsageError, match="no place"):
        Instruction("Which section?")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], {"prompt": "{title}"}, "no column 'title'"),
        ([{"words": "a"}], {}, "no column 'messages', 'prompt' or 'text'"),
        ([{"text": "a"}], {"label_column": "section"}, "no column 'section'"),
        ([{"messages": [USER]}], {"chat": None}, "no chat template"),
        ([{"text": "a"}, {"text": 5}], {}, "line 2: the text is int"),
        ([{"text": "a", "answer": ["b"]}], {}, "line 1: the answer is list"),
        ([{"messages": "hi"}], {}, "no list of objects"),
        ([{"messages": [{"content": "x"}]}], {}, "no list of objects"),
        ([{"messages": [USER]}, {"messages": [{"role": "tool", "content": "x"}]}], {}, "line 2: .*no tools"),
        ([{"prompt": "\ud800"}], {}, "surrogate"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, rows: list[object], options: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        read(tmp_path, *rows, **options)


def test_all_files_have_one_form(tmp_path: Path):
    reader = PromptReader(CHAT)
    first = written(tmp_path / "a.jsonl", {"prompt": "x"})
    second = written(tmp_path / "b.jsonl", {"text": "x"})
    reader(first, DataFiles(data=first))
    with pytest.raises(DataError, match="in one form"):
        reader(second, DataFiles(data=second))


@pytest.mark.parametrize(
    ("row", "chat", "form", "special", "warned"),
    [
        ({"messages": [USER]}, CHAT, Form.MESSAGES, False, False),
        ({"text": "x"}, CHAT, Form.TEXT, False, False),
        ({"text": "x"}, None, Form.TEXT, True, False),
        ({"prompt": "x"}, None, Form.PROMPT, True, False),
        ({"prompt": "x"}, CHAT, Form.PROMPT, True, True),
    ],
)
def test_who_adds_the_special_tokens(
    tmp_path: Path, row: object, chat: Chat | None, form: Form, special: bool, warned: bool
):
    path = written(tmp_path / "rows.jsonl", row)
    reader = PromptReader(chat)
    reader(path, DataFiles(data=path))
    assert (reader.form, reader.special, reader.warning is not None) == (form, special, warned)


def test_splits_are_made_of_prompts_without_duplicates(tmp_path: Path):
    rows = [{"text": f"number {row % 300}", "label": "odd" if row % 2 else "even"} for row in range(330)]
    path = written(tmp_path / "rows.jsonl", *rows)
    splits = load_splits(DataFiles(data=path), read=PromptReader(CHAT, Instruction("Odd? {text}")))
    prompts = [prompt for split in splits.by_name.values() for prompt in split.texts]
    assert sorted(prompts) == sorted(f"<user>Odd? number {row}<assistant>" for row in range(300))
    assert set(splits["test"].labels) == {"odd", "even"}


def test_ids_are_those_of_the_tokenizer():
    tokenizer = tiny_decoders.tiny_tokenizer()
    prompts = Prompts(tokenizer.backend_tokenizer.to_str().encode(), special=False, context=8)
    [ids] = prompts.encode(["the <|end|>"])
    assert ids.tolist() == tokenizer("the <|end|>", add_special_tokens=False)["input_ids"]
    assert ids[-1] == tiny_decoders.END_ID
    assert prompts.decode(ids) == "the "
    rows = prompts.encode(["", "the", "abcdef", "abcdefg"])
    assert prompts.fitting(rows, answer_tokens=2) == [1, 2]


def test_special_tokens_are_added_to_prompts_alone():
    fast = tiny_decoders.tiny_tokenizer().backend_tokenizer
    fast.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tiny_decoders.END_ID)]
    )
    content = fast.to_str().encode()
    assert Prompts(content, special=True, context=8).encode(["a"])[0][0] == tiny_decoders.END_ID
    assert len(Prompts(content, special=False, context=8).encode(["a"])[0]) == 1
    assert len(Prompts(content, special=True, context=8).encode_answers(["a"])[0]) == 1
