"""Texts to rows, with the model's own fast tokenizer; used by the router, the local predictor and optimize.

Only the `tokenizers` library is needed here, not transformers, so a router starts quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from fettle.detokenize import Detokenizer
from fettle.errors import RequestError
from fettle.manifest import TokenizerSpec
from fettle.rows import Row
from fettle.spelling import Spelling

Text = str | tuple[str, str]


class Tokenizer:
    """Encodes single texts and pairs; too long ones are cut on the right (of a pair, the longer side first)."""

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._fast: FastTokenizer = FastTokenizer.from_file(str(path))
        self._fast.no_padding()
        self._fast.no_truncation()
        # Truncation is a setting of the whole object, so the few texts that need it have one of their own.
        self._cutter: FastTokenizer = FastTokenizer.from_file(str(path))
        self._cutter.no_padding()
        self._cutting = Lock()

    def encode(self, texts: Sequence[Text], *, max_length: int | None = None, truncate: bool = True) -> list[Row]:
        """One row a text.

        Args:
            texts: single texts, or pairs.
            max_length: cut to this many tokens, special ones included; the model's own limit if None or larger.
            truncate: when false, a text that is too long is an error.

        Raises:
            RequestError: a text is too long and `truncate` is false.
        """
        limit = min(max_length or self.spec.max_length, self.spec.max_length)
        encodings = self._fast.encode_batch_fast(list(texts))
        rows = []
        for index, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            length = len(encoding)
            if length > limit and not truncate:
                raise RequestError(
                    f"input {index} has {length} tokens, the limit is {limit}; shorten it or allow truncation",
                    param="input",
                )
            encoding = encoding if length <= limit else self._shorter(text, limit)
            # Only a pair has a second segment, and asking is not free.
            types = np.array(encoding.type_ids, np.int8) if self.spec.segments and isinstance(text, tuple) else None
            rows.append(Row(np.array(encoding.ids, np.int32), types, truncated=length > limit))
        return rows

    def row_of_ids(
        self, ids: Sequence[int], *, index: int = 0, max_length: int | None = None, truncate: bool = True
    ) -> Row:
        """A row from token ids that the client made itself; used as they are, cut like a text.

        Raises:
            RequestError: an id outside the vocabulary, or too many and `truncate` is false.
        """
        bad = next((i for i in ids if not 0 <= i < self.spec.vocabulary), None)
        if bad is not None:
            raise RequestError(
                f"input {index}: token id {bad} is outside the vocabulary (0 to {self.spec.vocabulary - 1})",
                param="input",
            )
        limit = min(max_length or self.spec.max_length, self.spec.max_length)
        if len(ids) > limit and not truncate:
            raise RequestError(
                f"input {index} has {len(ids)} tokens, the limit is {limit}; shorten it or allow truncation",
                param="input",
            )
        return Row(np.array(ids[:limit], np.int32), truncated=len(ids) > limit)

    def pieces(self, text: str, *, special: bool) -> Encoding:
        """The full encoding (ids, tokens, offsets, special mask), never truncated; for `/tokenize`."""
        return self._fast.encode(text, add_special_tokens=special)

    def ids(self, text: str, *, special: bool) -> NDArray[np.int32]:
        """A prompt's ids, int32 [tokens], never truncated; `special`: with the tokens that begin or end every text."""
        [encoding] = self._fast.encode_batch_fast([text], add_special_tokens=special)
        return np.array(encoding.ids, np.int32)

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._fast.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def spelling(self) -> Spelling:
        """What each token stands for."""
        return Spelling(self._fast)

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """Makes text of token ids as they come."""
        return Detokenizer(self._fast, self.spelling)

    def _shorter(self, text: Text, limit: int) -> Encoding:
        with self._cutting:
            self._cutter.enable_truncation(limit, strategy="longest_first")
            return self._cutter.encode(*(text if isinstance(text, tuple) else (text,)))
