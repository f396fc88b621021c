"""What of a text is compared, from what the user says on the command line and from the data's own answers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fettle.errors import UsageError
from fettle.extract import AnswerSpec, Extract, FunctionAnswer, UserFunction, extractor
from optimize.data import Splits

# More labels than this are no labels.
MOST_LABELS = 1000


def answer_spec(said: str | None, splits: Splits) -> AnswerSpec:
    """The specification behind `text`, `labels`, `pattern=REGEX` or `function=module:name`; the whole text if None.

    Raises:
        UsageError: the data have no labels to take, or too many; or the expression is none.
    """
    kind, _, value = (said or "text").partition("=")
    parts: dict[str, Any] = {"kind": kind}
    if kind == "labels":
        parts["labels"] = _labels(splits)
    elif value:
        parts[kind] = value
    try:
        spec: AnswerSpec = TypeAdapter(AnswerSpec).validate_python(parts)
    except ValidationError as error:
        raise UsageError(f"--answer {said}: {error.errors()[0]['msg']}", param="answer") from None
    return spec


def extract_for(spec: AnswerSpec) -> Extract:
    """The function that reads answers; a function of the user's is imported, from the working directory too.

    Raises:
        UsageError: there is no such function.
    """
    return extractor(spec, _imported(spec.function) if isinstance(spec, FunctionAnswer) else None)


def _labels(splits: Splits) -> list[str]:
    found = {label for split in splits.by_name.values() for label in split.labels or [] if label is not None}
    if not found:
        raise UsageError(
            "--answer labels: the data have no labels; name their column with --label-column, or compare --answer text",
            param="answer",
        )
    if len(found) > MOST_LABELS:
        raise UsageError(
            f"--answer labels: the data have {len(found)} different answers, which are texts rather than labels; "
            "use --answer text or a pattern",
            param="answer",
        )
    return sorted(found)


def _imported(name: str) -> UserFunction:
    module, _, function = name.partition(":")
    try:
        with _here():
            found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--answer function={name}: cannot be imported ({error})", param="answer") from None
    if not callable(found):
        raise UsageError(f"--answer function={name} is a {type(found).__name__}, not a function", param="answer")
    called: UserFunction = found
    return called


@contextmanager
def _here() -> Iterator[None]:
    """Modules of the working directory can be imported, as by `python -m`."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
