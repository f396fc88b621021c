"""What the tokens of a text have to keep to: a grammar, and a client's budget for reasoning."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from deployments.text_source import Ids
from deployments.text_work import TextWork
from fettle.errors import RequestError
from fettle.generation import Constraint, GrammarSpec
from fettle.grammar import Grammars
from fettle.manifest import Task
from fettle.reasoning import ThinkBudget, ThinkingConstraint

# How most models that reason mark it.
OPENING, CLOSING = "<think>", "</think>"


class TextRules:
    """The engine's `Rules` for one tokenizer."""

    def __init__(self, path: str, tokenizer: FastTokenizer, task: Task) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = task.width
        # Made when the first grammar comes: it takes a second where the vocabulary is large.
        self._grammars = cache(lambda: Grammars(Path(path).read_text("utf-8"), task.width, task.end_ids))

    def constraint(self, work: TextWork, prompt: Ids) -> Constraint | None:
        """Raises RequestError: the grammar cannot be compiled, or the model marks no reasoning."""
        grammar = None if work.grammar is None else self._grammar(work.grammar)
        tokens = None if work.early_stop is None else work.early_stop.reasoning_budget
        if tokens is None:
            return grammar
        return ThinkingConstraint(self._budget(tokens, prompt), self._vocabulary, grammar)

    def _grammar(self, spec: GrammarSpec) -> Constraint:
        return self._grammars().constraint(spec)

    def _budget(self, tokens: int, prompt: Ids) -> ThinkBudget:
        opening, closing = (tuple(self._ids(mark)) for mark in (OPENING, CLOSING))
        if len(opening) != 1 or len(closing) != 1:
            raise RequestError(
                f"early_stop.reasoning_budget: this model has no tokens {OPENING} and {CLOSING}; leave it out",
                param="early_stop",
            )
        opened, closed = (np.flatnonzero(prompt == mark[0]) for mark in (opening, closing))
        inside = len(opened) > 0 and (not len(closed) or closed[-1] < opened[-1])
        return ThinkBudget(tokens, opening, closing, forced=closing, inside=inside)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
