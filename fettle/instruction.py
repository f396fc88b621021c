"""A prompt with places for what a row says, such as "Which language is this?\\n{text}"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from fettle.errors import UsageError

PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")


class Instruction:
    """Its columns are the names of its places; `text` is the row's text, whatever its column is called."""

    def __init__(self, template: str) -> None:
        """`template`: `\\n` written out, as it comes from a shell, is a line break.

        Raises:
            UsageError: there is no place for anything in it.
        """
        self.template = template.replace("\\n", "\n")
        self.columns = list(dict.fromkeys(PLACEHOLDER.findall(self.template)))
        if not self.columns:
            raise UsageError("the prompt has no place for the text; write {text} where it goes", param="prompt")

    def fill(self, record: Mapping[str, Any]) -> str:
        """The prompt for one row."""
        return PLACEHOLDER.sub(lambda place: str(record[place[1]]), self.template)
