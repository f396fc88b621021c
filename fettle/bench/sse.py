"""A generated text as it streams in: when each piece came, how many tokens it has, and whether it came to its end."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

# A piece with text in it: OpenAI's completions (`text`) and chats (`content`), what is thought included.
TEXT = re.compile(rb'"(?:text|content|reasoning|reasoning_content)":\s*"[^"]')
TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
DONE = b"[DONE]"


@dataclass(slots=True)
class Stream:
    """Server-sent events of one reply. `came`: when each event with text in it did, on the clock of `perf_counter`.

    `tokens` is what the server's own `usage` says, None where it says nothing.
    """

    came: list[float] = field(default_factory=list)
    tokens: int | None = None
    done: bool = False
    failed: bool = False
    _rest: bytes = b""

    def feed(self, piece: bytes) -> None:
        """Take what arrived now."""
        now = time.perf_counter()
        *lines, self._rest = (self._rest + piece).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == DONE:
            self.done = True
            return
        if data.startswith(b'{"error"'):
            self.failed = True
        if TEXT.search(data):
            self.came.append(now)
        found = TOKENS.search(data)
        if found:
            self.tokens = int(found[1])

    @property
    def problem(self) -> str:
        """Why this is no whole text; empty if it is one.

        Not every server ends with `[DONE]`, as OpenAI's does; `usage` comes after all text as well.
        """
        if self.failed:
            return "error in the stream"
        if not self.done and self.tokens is None:
            return "stream cut off"
        return "" if self.came or self.tokens == 0 else "no text in the stream"

    @property
    def length(self) -> int:
        """Tokens, or events with text where the server does not say."""
        return len(self.came) if self.tokens is None else self.tokens
