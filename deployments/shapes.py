"""From request bodies to texts and back to the shapes of OpenAI, vLLM and TEI: pure functions, one for each quirk."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fettle.errors import RequestError
from fettle.manifest import Head, Task
from fettle.tokenizer import Text


def texts_or_ids(inputs: Any) -> tuple[list[Text], list[list[int]]]:
    """One of the two lists is empty. The schema has already made sure of the shape."""
    if isinstance(inputs, str):
        return [inputs], []
    if isinstance(inputs[0], int):
        return [], [inputs]
    return ([], inputs) if isinstance(inputs[0], list) else (inputs, [])


def pairs(inputs: str | list[str] | list[list[str]]) -> tuple[list[Text], bool]:
    """TEI's nesting: a list of strings is one text or one pair, a list of lists is a batch of them."""
    if isinstance(inputs, str):
        return [inputs], True
    if isinstance(inputs[0], str):
        return [_text(inputs)], True
    return [_text(item) for item in inputs], False


def _text(item: list[str]) -> Text:
    return item[0] if len(item) == 1 else (item[0], item[1])


def length_limit(truncate_prompt_tokens: int | None) -> int | None:
    if truncate_prompt_tokens in (None, -1):
        return None
    if truncate_prompt_tokens is not None and truncate_prompt_tokens < 2:
        raise RequestError("truncate_prompt_tokens: must be -1 or at least 2", param="truncate_prompt_tokens")
    return truncate_prompt_tokens


def check_dimensions(task: Task, dimensions: int | None) -> None:
    width = task.width
    if dimensions is not None and dimensions > width:
        raise RequestError(f"dimensions: {dimensions} asked, the model has {width}", param="dimensions")


def labels(task: Task) -> list[str]:
    return task.labels if task.head is not Head.REGRESSION or task.labels else ["score"]


def as_floats(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(vector)


def as_base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").data).decode()
