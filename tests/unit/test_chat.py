"""Chat templates: the same text as transformers makes of them, within bounds, and readable refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fettle import chat as module
from fettle.chat import Chat, ChatTemplate
from fettle.errors import FamilyError, ModelError, RequestError
from tests.unit.chat_templates import ALL, CHATML, ELABORATE, GEMMA, LLAMA_3, MISTRAL, QWEN_3

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße, 'x' < y"},
    {"role": "assistant", "content": " fine \n", "tool_calls": None},
    {"role": "user", "content": "And?", "name": None},
]
TOOLS = [
    {"type": "function", "function": {"name": "größe", "description": "size", "parameters": {"a": ["<b>"], "c": None}}},
    {"type": "function", "function": {"name": "now", "description": "time", "parameters": {}}},
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "größe", "arguments": {"a": 1.5, "b": None}}}
CALLED = [
    *TALK[1:],
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "170", "tool_call_id": "abcdefghi"},
]
DOCUMENTS = [{"title": "T", "text": "Once."}, {"title": "U", "text": "Twice."}]


def as_transformers(template: str, messages: list[dict], open_answer: bool, **extra: object) -> str:
    bare = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, **TOKENS)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=open_answer, **extra
    )


def chat_of(template: str) -> Chat:
    return Chat(ChatTemplate(source=template, special_tokens=TOKENS))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("open_answer", [True, False])
@pytest.mark.parametrize("count", [2, 4])
def test_the_text_is_that_of_transformers(name: str, open_answer: bool, count: int):
    mine = chat_of(ALL[name]).render(TALK[:count], open_answer=open_answer)
    assert mine == as_transformers(ALL[name], TALK[:count], open_answer)
    assert "Grüße" in mine


@pytest.mark.parametrize("template", [QWEN_3, LLAMA_3, MISTRAL], ids=["qwen-3", "llama-3", "mistral"])
def test_tools_calls_and_their_results_are_told_as_transformers_tells_them(template: str):
    mine = chat_of(template).render(CALLED, tools=TOOLS)
    assert mine == as_transformers(template, CALLED, True, tools=TOOLS)
    assert "größe" in mine
    assert "170" in mine


def test_tools_documents_and_settings_reach_the_template():
    settings = {"enable_thinking": True}
    mine = chat_of(ELABORATE).render(TALK, tools=TOOLS, documents=DOCUMENTS, settings=settings)
    assert mine == as_transformers(ELABORATE, TALK, True, tools=TOOLS, documents=DOCUMENTS, **settings)
    assert "[U]Twice." in mine
    assert mine.endswith("<think>>")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("content", ["The answer is", "padded: \n"])
def test_a_last_message_is_continued_as_transformers_does(name: str, content: str):
    messages = [*TALK[1:2], {"role": "assistant", "content": content}]
    mine = chat_of(ALL[name]).render(messages, continue_last=True)
    assert mine == as_transformers(ALL[name], messages, False, continue_final_message=True)
    assert mine.rstrip().endswith(content.rstrip())
    assert messages[-1]["content"] == content


def test_a_last_message_that_is_not_shown_cannot_be_continued():
    template = "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="does not show") as caught:
        chat_of(template).render(TALK, continue_last=True)
    assert caught.value.param == "continue_final_message"


def test_a_refusal_of_the_template_is_the_clients_to_read():
    with pytest.raises(RequestError, match="empty message") as caught:
        chat_of(ELABORATE).render([{"role": "user", "content": ""}])
    assert caught.value.param == "messages"
    with pytest.raises(RequestError, match="must alternate"):
        chat_of(GEMMA).render([TALK[1], TALK[1]])
    with pytest.raises(RequestError, match="chat template"):
        Chat(ChatTemplate(source=CHATML)).render([{"role": "user"}])


@pytest.mark.parametrize("name", sorted(module.RESERVED))
def test_settings_cannot_replace_the_messages(name: str):
    with pytest.raises(RequestError) as caught:
        chat_of(CHATML).render(TALK, settings={name: []})
    assert caught.value.param == name


def test_a_broken_template_is_refused():
    with pytest.raises(ModelError, match="does not compile"):
        Chat(ChatTemplate(source="{% for m in messages %}"))


def test_a_template_cannot_leave_its_sandbox():
    with pytest.raises(RequestError, match="unsafe"):
        Chat(ChatTemplate(source="{{ messages.__class__.__mro__ }}")).render([])


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}",
    ],
    ids=["loops", "recursion"],
)
def test_a_template_that_would_go_on_for_ever_is_stopped(monkeypatch, template: str):
    monkeypatch.setattr(module, "MOST_SECONDS", 0.05)
    with pytest.raises(RequestError, match="longer than"):
        chat_of(template).render(TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(9000) %}{{ messages[0].content }}{% endfor %}",
        "{{ 'x' * 100000000 }}",
        "{{ 2 ** 100000000 }}",
        "{{ range(100000000) }}",
    ],
)
def test_a_template_that_would_write_without_end_is_stopped(monkeypatch, template: str):
    monkeypatch.setattr(module, "MOST_CHARACTERS", 100_000)
    with pytest.raises(RequestError):
        chat_of(template).render(TALK)


def test_multiplication_in_a_template_still_works():
    assert chat_of("{{ 'ab' * 3 }}{{ 2 * 3 }}{{ 2 ** 5 }}{{ 0.5 * 4 }}").render(TALK) == "ababab6322.0"


# As transformers leaves it on the disk.


def save(directory: Path, template: object, **names: object) -> None:
    config = {"chat_template": template, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_template_is_read_with_its_special_tokens(tmp_path: Path):
    bare = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, **TOKENS)
    tokenizer.chat_template = ELABORATE
    tokenizer.save_pretrained(tmp_path)
    assert ChatTemplate.read(tmp_path) == ChatTemplate(source=ELABORATE, special_tokens=TOKENS)


@pytest.mark.parametrize("name", ALL)
def test_a_template_written_is_the_template_read(tmp_path: Path, name: str):
    template = ChatTemplate(source=ALL[name], special_tokens=TOKENS)
    for file, content in template.files().items():
        (tmp_path / file).write_bytes(content)
    assert ChatTemplate.read(tmp_path) == template


def test_older_forms_of_the_configuration(tmp_path: Path):
    save(tmp_path, CHATML, bos_token={"content": "<s>", "lstrip": False}, eos_token=None)
    assert ChatTemplate.read(tmp_path) == ChatTemplate(source=CHATML, special_tokens={"bos_token": "<s>"})
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    save(tmp_path, named)
    assert ChatTemplate.read(tmp_path) == ChatTemplate(source="d")


def test_no_template(tmp_path: Path):
    assert ChatTemplate.read(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FamilyError, match="not valid JSON"):
        ChatTemplate.read(tmp_path)
