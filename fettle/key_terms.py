"""What an API key's holder may take, for keys in the configuration and for those in a file of their own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from fettle.schema import Identifier, Strict


class KeyTerms(Strict):
    """What the holder of an API key may take. Backlogged keys share the machine by their weights."""

    name: Identifier
    weight: float = Field(default=1.0, gt=0)
    max_concurrent: int | None = Field(default=None, ge=1, description="requests at a time")
    tokens_per_second: float | None = Field(default=None, gt=0, description="on average; bursts of a few seconds pass")


class KeyConfig(KeyTerms):
    """An API key in the configuration itself, which is then a secret."""

    key: Annotated[str, StringConstraints(min_length=8)] = Field(repr=False)
