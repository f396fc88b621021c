"""Chat templates: the same text as transformers makes of them, and readable refusals."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fettle.chat import Chat, ChatTemplate
from fettle.errors import ModelError, RequestError

CHATML = """{% for m in messages %}
{{'<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>' + '
'}}{% endfor %}
{% if add_generation_prompt %}{{'<|im_start|>assistant
'}}{% endif %}"""
# Blocks on lines of their own, white space control, loop controls, a namespace, `tojson`, `generation`, special tokens.
ELABORATE = """{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for m in messages if m.role == 'system' %}
    {%- set ns.system = m.content %}
{%- endfor %}
{%- if tools %}
    {{- '[TOOLS]' ~ (tools | tojson(indent=2)) }}
{%- endif %}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}
    {%- else %}
        {%- if not m.content %}{{ raise_exception('empty message') }}{% endif %}
        {{- '[' ~ loop.index ~ ':' ~ ns.system ~ ']' ~ m.content }}
        {%- if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<think>' if enable_thinking else '' }}>{% endif %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße, 'x' < y"},
    {"role": "assistant", "content": " fine \n", "tool_calls": None},
    {"role": "user", "content": "And?", "name": None},
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"a": ["<b>"]}}}]


def as_transformers(template: str, messages: list[dict], open_answer: bool, **extra: object) -> str:
    bare = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, **TOKENS)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=open_answer, **extra
    )


@pytest.mark.parametrize("template", [CHATML, ELABORATE], ids=["chatml", "elaborate"])
@pytest.mark.parametrize("open_answer", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_text_is_that_of_transformers(template: str, open_answer: bool, count: int):
    chat = Chat(ChatTemplate(source=template, special_tokens=TOKENS))
    mine = chat.render(TALK[:count], open_answer=open_answer)
    assert mine == as_transformers(template, TALK[:count], open_answer)
    assert mine


def test_tools_and_settings_reach_the_template():
    chat = Chat(ChatTemplate(source=ELABORATE, special_tokens=TOKENS))
    mine = chat.render(TALK, tools=TOOLS, settings={"enable_thinking": True})
    assert mine == as_transformers(ELABORATE, TALK, True, tools=TOOLS, enable_thinking=True)
    assert "größe" in mine
    assert mine.endswith("<think>>")


def test_a_refusal_of_the_template_is_the_clients_to_read():
    chat = Chat(ChatTemplate(source=ELABORATE, special_tokens=TOKENS))
    with pytest.raises(RequestError, match="empty message") as caught:
        chat.render([{"role": "user", "content": ""}])
    assert caught.value.param == "messages"
    with pytest.raises(RequestError, match="chat template"):
        Chat(ChatTemplate(source=CHATML)).render([{"role": "user"}])


def test_a_broken_template_is_refused():
    with pytest.raises(ModelError, match="does not compile"):
        Chat(ChatTemplate(source="{% for m in messages %}"))


def test_a_template_cannot_leave_its_sandbox():
    with pytest.raises(RequestError, match="unsafe"):
        Chat(ChatTemplate(source="{{ messages.__class__.__mro__ }}")).render([])
