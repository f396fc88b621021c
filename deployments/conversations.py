"""From a conversation in OpenAI's shape to the text that a model continues, by its own chat template.

Templates want less than OpenAI's messages may hold: content as one text, arguments of calls as objects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from deployments.router import TOKENIZE_INLINE_CHARACTERS
from deployments.served import ServedFamily
from deployments.text_schemas import ChatMessage, Conversation, TextPart
from fettle.chat import Chat, ChatTemplate
from fettle.errors import RequestError
from fettle.manifest import TaskKind

DEVELOPER = "developer"


class Conversations:
    """The chat templates of the families that generate text, compiled once."""

    def __init__(self, families: Iterable[ServedFamily]) -> None:
        """Raises FamilyError, ModelError: a family's template cannot be read, or is none."""
        templates = {
            served.name: ChatTemplate.read(served.family.tokenizer_path.parent)
            for served in families
            if served.task.kind is TaskKind.GENERATE
        }
        self._chats = {name: Chat(template) for name, template in templates.items() if template is not None}

    def chat(self, family: ServedFamily) -> Chat:
        """Raises RequestError for a family without a chat template."""
        chat = self._chats.get(family.name)
        if chat is None:
            raise RequestError(
                f"messages: model {family.name!r} has no chat template; send a prompt to /v1/completions instead, or "
                "make the family again from a checkpoint that has one",
                param="messages",
            )
        return chat

    async def prompt(
        self,
        family: ServedFamily,
        given: Conversation,
        *,
        with_tools: bool = True,
        settings: Mapping[str, object] | None = None,
    ) -> str:
        """The text to continue.

        Args:
            with_tools: tell the template of the tools.
            settings: what the template may read beside what the client itself set for it.

        Raises:
            RequestError: the template refuses this conversation.
        """
        chat = self.chat(family)
        size = sum(len(message.content or "") for message in given.messages)
        if size > TOKENIZE_INLINE_CHARACTERS:
            return await asyncio.to_thread(_prompt, chat, given, with_tools, settings or {})
        return _prompt(chat, given, with_tools, settings or {})


def _prompt(chat: Chat, given: Conversation, with_tools: bool, settings: Mapping[str, object]) -> str:
    last = given.messages[-1]
    if given.continue_final_message:
        if given.add_generation_prompt:
            raise RequestError(
                "continue_final_message: set add_generation_prompt to false with it, or leave it out",
                param="continue_final_message",
            )
        if last.role != "assistant" or last.content is None:
            raise RequestError(
                "continue_final_message: the last message must be an assistant's with content",
                param="continue_final_message",
            )
    tools = [tool.model_dump(exclude_unset=True) for tool in given.tools or []]
    return chat.render(
        [_message(message, place, chat) for place, message in enumerate(given.messages)],
        tools=tools if tools and with_tools else None,
        documents=given.documents,
        open_answer=given.add_generation_prompt is not False,
        continue_last=bool(given.continue_final_message),
        settings={**settings, **(given.chat_template_kwargs or {})},
    )


def _message(message: ChatMessage, place: int, chat: Chat) -> dict[str, Any]:
    # Most templates know no developer, whose word the system's is.
    role = "system" if message.role == DEVELOPER and DEVELOPER not in chat.source else message.role
    made: dict[str, Any] = {"role": role, "content": _text(message)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        made[name] = getattr(message, name)
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(
                        call.function.arguments, f"messages.{place}.tool_calls.{number}.function.arguments"
                    ),
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return made


def _text(message: ChatMessage) -> str | None:
    if message.content is None or isinstance(message.content, str):
        return message.content if message.content is not None else message.refusal
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in message.content)


def _arguments(text: str, where: str) -> object:
    try:
        return orjson.loads(text or "{}")
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"{where}: not valid JSON ({error}); send them as the model gave them", param=where
        ) from None
