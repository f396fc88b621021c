"""What each token stands for, in bytes: a token of a byte-level vocabulary may be no whole character.

For what is told about single tokens. The text of several in a row is the tokenizer's decoder's to make.
"""

from __future__ import annotations

import re
from typing import Final

import orjson
from tokenizers import Tokenizer as FastTokenizer

SPACE_MARK: Final = "▁"
LONE_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """Spells the tokens of one vocabulary, whatever kind of decoder it has."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
        kinds = _kinds(None if tokenizer.decoder is None else orjson.loads(tokenizer.decoder.__getstate__()))
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._marked = bool(kinds & {"Metaspace", "Replace"})

    def bytes_of(self, token: int) -> bytes:
        """A token's part of a text; nothing for an id that no token has."""
        added = self._added.get(token)
        if added is not None:
            return added.encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return b"".join(BYTES[char] if char in BYTES else char.encode() for char in piece)
        lone = LONE_BYTE.fullmatch(piece) if self._byte_fallback else None
        if lone is not None:
            return bytes([int(lone[1], 16)])
        return (piece.replace(SPACE_MARK, " ") if self._marked else piece).encode()


def shown(spelled: bytes) -> str:
    """A token as text; where its bytes are no whole characters, as OpenAI writes such: `bytes:\\xe6\\xbc`."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _kinds(decoder: object) -> set[str]:
    """The types of a decoder and of those that it is made of."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*(_kinds(part) for part in decoder.get("decoders", [])))


def _bytes_by_char() -> dict[str, bytes]:
    """GPT-2's way to write a byte as a visible character: itself where it is one, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    chars = {chr(byte): bytes([byte]) for byte in visible}
    return chars | {chr(256 + place): bytes([byte]) for place, byte in enumerate(hidden)}


BYTES: Final = _bytes_by_char()
