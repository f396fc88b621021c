"""Text from token ids as they come: whole characters only, and nothing that may turn out to be a stop string.

The pieces of a stream add up to what the tokenizer makes of all its tokens at once. One thing is better: of byte
tokens (`<0xE2>`) in a row the tokenizer shows none as soon as one does not fit; here those that were whole characters
stay, and each byte that belongs to none is one replacement character.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import orjson
from tokenizers import Tokenizer as FastTokenizer

from fettle.errors import RequestError
from fettle.spelling import SPACE_MARK, Spelling

REPLACEMENT: Final = "�"
# What `surrogateescape` makes of a byte that is part of no character.
ESCAPED: Final = re.compile("[\udc80-\udcff]")
# A character has at most four bytes, so at most three tokens wait for its last.
WAITING: Final = 3
# A decoder that spaces words looks at the tokens before; one that gave no text needs those before it, too.
CONTEXT: Final = 8


class TextStream(ABC):
    """The text of one generation.

    Attributes:
        offsets: for each token that was pushed, the number of characters before its own.
        length: characters so far.
    """

    def __init__(self, skipped: frozenset[int]) -> None:
        self.offsets: list[int] = []
        self.length = 0
        self._skipped = skipped

    def push(self, token: int) -> str:
        """What the token adds to the text; nothing while a character is incomplete."""
        self.offsets.append(self.length)
        text = "" if token in self._skipped else self._add(token)
        self.length += len(text)
        return text

    def finish(self) -> str:
        """The rest, when no more tokens come: replacement characters for bytes that never became one."""
        text = self._rest()
        self.length += len(text)
        return text

    @abstractmethod
    def _add(self, token: int) -> str: ...

    @abstractmethod
    def _rest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class _Bytes:
    """A decoder that puts the tokens' bytes in a row: what becomes of bad ones, and what is cut from the beginning."""

    errors: str
    leading: str = ""


class Detokenizer:
    """Makes the streams of one tokenizer."""

    def __init__(self, tokenizer: FastTokenizer, spelling: Spelling | None = None) -> None:
        self._tokenizer = tokenizer
        self._spelling = spelling or Spelling(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, content in added.items() if content.special)
        self._bytes = _bytes_of(None if tokenizer.decoder is None else orjson.loads(tokenizer.decoder.__getstate__()))

    def stream(self, *, skip_special: bool = True, before: Sequence[int] = ()) -> TextStream:
        """A text that begins with the next token.

        Args:
            skip_special: special tokens give no text.
            before: the tokens that it continues, at least the last few, where there are any: a SentencePiece tokenizer
                leaves out the space before the first word of a text, but not before a word that continues one.
        """
        skipped = self._special if skip_special else frozenset()
        kept = [int(token) for token in before[-CONTEXT:] if token not in skipped]
        if self._bytes is None:
            return _WindowStream(skipped, self._tokenizer, kept)
        leading = "" if kept else self._bytes.leading
        return _ByteStream(skipped, self._spelling, self._bytes.errors, leading)


class _ByteStream(TextStream):
    """Tokens are bytes, in a row."""

    def __init__(self, skipped: frozenset[int], spelling: Spelling, errors: str, leading: str) -> None:
        super().__init__(skipped)
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._leading = leading

    def _add(self, token: int) -> str:
        return self._shown(self._decoder.decode(self._spelling.bytes_of(token)))

    def _rest(self) -> str:
        return self._shown(self._decoder.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if not text.isascii():
            text = ESCAPED.sub(REPLACEMENT, text)
        while self._leading and text:
            if text[0] != self._leading[0]:
                self._leading = ""
            else:
                text, self._leading = text[1:], self._leading[1:]
        return text


class _WindowStream(TextStream):
    """Tokens are texts that the tokenizer's decoder joins in a way of its own: what it adds after the last few.

    A decoder that is not known may have bytes among its tokens, so what ends in a replacement character waits a little.
    """

    def __init__(self, skipped: frozenset[int], tokenizer: FastTokenizer, context: list[int]) -> None:
        super().__init__(skipped)
        self._tokenizer = tokenizer
        self._context = context
        self._waiting: list[int] = []

    def _add(self, token: int) -> str:
        self._waiting.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._waiting) <= WAITING:
            return ""
        return self._settle(text)

    def _rest(self) -> str:
        return self._settle(self._new_text()) if self._waiting else ""

    def _settle(self, text: str) -> str:
        self._context = (self._waiting if text else self._context + self._waiting)[-CONTEXT:]
        self._waiting = []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._waiting)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def _bytes_of(decoder: object) -> _Bytes | None:
    """What a decoder does with bytes, where it is one of those that put them in a row; from its JSON."""
    match decoder:
        case {"type": "ByteLevel"} | {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}:
            return _Bytes("replace")
        case {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": mark}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *rest,
            ],
        } if mark == SPACE_MARK:
            match rest:
                case []:
                    return _Bytes("surrogateescape")
                case [{"type": "Strip", "content": str(content), "start": int(start), "stop": 0}]:
                    return _Bytes("surrogateescape", content * start)
    return None


class StopStrings:
    """Ends a text where one of several strings appears in it, however the text is cut into pieces.

    The one that is complete first counts, of several that are complete at the same character the longest. For each
    string a character is looked at a constant number of times on average (Knuth, Morris and Pratt's algorithm).

    Attributes:
        matched: the string that ended the text, or None.
        length: characters that were passed on.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the string that ends the text stays part of it. Raises RequestError: an empty string."""
        if not all(stops):
            raise RequestError("a stop string must not be empty", param="stop")
        self.matched: str | None = None
        self.length = 0
        self._include = include
        self._stops = tuple(stops)
        self._states = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """What may be passed on after this text came: not what may be the beginning of a stop string."""
        if self.matched is not None:
            return ""
        end = len(text)
        for number, stop in enumerate(self._stops):
            # Only what ends before another one does counts, and at the same place what is longer.
            state, found = _advance(stop, self._states[number], text[:end])
            self._states[number] = state
            if found and (found < end or self.matched is None or len(stop) > len(self.matched)):
                end, self.matched = found, stop
        held = 0 if self._include else max(self._states, default=0)
        if self.matched is not None and not self._include:
            held = len(self.matched)
        text = self._held + text[:end]
        keep = len(text) - held
        self._held = text[keep:] if self.matched is None else ""
        return self._passed(text[:keep])

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return self._passed(held)

    def _passed(self, text: str) -> str:
        self.length += len(text)
        return text


def _advance(stop: str, state: int, text: str) -> tuple[int, int]:
    """How much of `stop` the text ends with, and where in the text it was complete first; 0 where it was not."""
    if not state and stop[0] not in text:
        return 0, 0
    borders = _borders(stop)
    for index, char in enumerate(text, start=1):
        while state and stop[state] != char:
            state = borders[state - 1]
        if stop[state] == char:
            state += 1
        if state == len(stop):
            return state, index
    return state, 0


@lru_cache(maxsize=64)
def _borders(text: str) -> array[int]:
    """For each beginning of the text, how long the longest shorter beginning is that it also ends with."""
    borders, length = array("I", [0]), 0
    for char in text[1:]:
        while length and text[length] != char:
            length = borders[length - 1]
        if text[length] == char:
            length += 1
        borders.append(length)
    return borders
