"""Text generation without an engine: families with a tokenizer of bytes and a chat template, and scripted sources."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from deployments.text_source import Answering, Piece, Spent, TextCall
from fettle.family import FAMILY_FILE, TOKENIZER_FILE, Family, record_files
from fettle.generation import Finish, Token
from fettle.manifest import Task, TaskKind
from fettle.spelling import BYTES
from tests.fakes import SPECIAL, WORDS, FakeVariant, change_json, make_fake_family

ENDOFTEXT, IM_START, IM_END, BOS = range(4)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
FIRST_BYTE = len(SPECIALS)
CONTEXT = 512
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# An impossible token and its place in every script's alternatives.
OTHER, OTHER_LOGPROB = ord("~") + FIRST_BYTE, -2.5

Script = Callable[[TextCall], Iterable[Piece | Exception | asyncio.Event]]


def ids_of(text: str | bytes) -> list[int]:
    return [FIRST_BYTE + byte for byte in (text.encode() if isinstance(text, str) else text)]


def make_text_family(
    directory: Path,
    *,
    name: str = "lm",
    template: str | None = CHATML,
    context: int = CONTEXT,
    variants: Iterable[FakeVariant] = (FakeVariant("bf16"), FakeVariant("int4")),
) -> Family:
    """A family of 4 special tokens and the 256 bytes, whose variants generate nothing by themselves."""
    assert len(SPECIAL) + len(WORDS) == len(SPECIALS) + len(BYTES)
    task = Task(kind=TaskKind.GENERATE, width=FIRST_BYTE + 256, end_ids=[IM_END])
    make_fake_family(directory, name=name, task=task, variants=list(variants), max_length=context)
    (directory / TOKENIZER_FILE).write_text(_tokenizer().to_str())
    config = {"bos_token": SPECIALS[BOS], "eos_token": SPECIALS[IM_END], "chat_template": template}
    (directory / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    files = [record.model_dump(mode="json") for record in record_files(directory / "tokenizer")]
    change_json(
        directory / FAMILY_FILE,
        tokenizer_files=[{**record, "path": f"tokenizer/{record['path']}"} for record in files],
    )
    return Family.open(directory)


@dataclass
class ScriptedSource:
    """Does for each call what its script says: gives a piece, raises an error, or waits for an event.

    `pulled` counts the pieces that somebody asked for, `open` the calls that are under way.
    """

    script: Script
    calls: list[TextCall] = field(default_factory=list)
    pulled: int = 0
    open_calls: int = 0
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def open(self, call: TextCall) -> AsyncGenerator[Piece, None]:
        self.calls.append(call)
        self.open_calls += 1
        self.opened.set()
        try:
            for item in self.script(call):
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    # Others get a turn, as they do while a real source works.
                    await asyncio.sleep(0)
                    self.pulled += 1
                    yield item
        finally:
            self.open_calls -= 1


def token(id: int, place: int = 0) -> Token:
    """With a log-probability that its place determines, and two alternatives."""
    logprob = -0.25 * (place % 4 + 1)
    return Token(id, logprob, ((id, logprob), (OTHER, OTHER_LOGPROB)))


def prompt_tokens(ids: Iterable[int]) -> tuple[Token, ...]:
    told = [token(id, place) for place, id in enumerate(ids)]
    return (Token(told[0].id, math.nan), *told[1:])


def pieces_of(
    call: TextCall,
    choice: int,
    text: str,
    *,
    size: int = 4,
    finish: Finish = Finish.STOP,
    stopped_by: str | None = None,
) -> list[Piece]:
    """One choice's text in pieces of so many tokens, which are its bytes; characters only when they are whole."""
    ids = ids_of(text)
    made = []
    for start in range(0, max(1, len(ids)), size):
        end = min(start + size, len(ids))
        tokens = tuple(token(id, start + place) for place, id in enumerate(ids[start:end]))
        made.append(Piece(choice, _whole(text, start, end), tokens))
    if call.prompt_logprobs:
        place = choice if call.vote else choice // call.choices
        made[0] = replace(made[0], prompt=prompt_tokens(call.prompts[place].tolist()))
    made[-1] = replace(made[-1], finish=finish, stopped_by=stopped_by)
    return made


def framed(pieces: list[Piece], *, answering: Answering | None = None, spent: Spent | None = None) -> list[Piece]:
    """With what the first and the last piece of a call have besides."""
    tokens = sum(len(piece.tokens) for piece in pieces)
    pieces[0] = replace(pieces[0], answering=answering or Answering(("bf16",), bound="exact", queue_ms=1.5))
    pieces[-1] = replace(pieces[-1], spent=spent or Spent(tokens, cached_tokens=3, infer_ms=20.0))
    return pieces


def says(*texts: str, size: int = 4, finish: Finish = Finish.STOP) -> Script:
    """A script that answers choice n with text n (again from the first where there are fewer), choices in turn."""

    def script(call: TextCall) -> list[Piece]:
        choices = [
            pieces_of(call, number, texts[number % len(texts)], size=size, finish=finish)
            for number in range(call.answers)
        ]
        longest = max(map(len, choices))
        turns = [choice[turn] for turn in range(longest) for choice in choices if turn < len(choice)]
        return framed(turns)

    return script


def _whole(text: str, start: int, end: int) -> str:
    """The characters of a text that become whole with these of its bytes."""
    data = text.encode()
    return data[:end].decode(errors="ignore")[len(data[:start].decode(errors="ignore")) :]


def _tokenizer() -> FastTokenizer:
    vocabulary = {special: place for place, special in enumerate(SPECIALS)}
    vocabulary |= {char: FIRST_BYTE + spelled[0] for char, spelled in BYTES.items()}
    tokenizer = FastTokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, special=True) for special in SPECIALS])
    return tokenizer
