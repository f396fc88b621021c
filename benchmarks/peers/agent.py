"""One text generator in a process of its own, told what to do by lines of JSON. Knows the standard library only.

Asked on standard input, answered on standard output, a line each:

    {"kind": "greedy", "prompts": [[ids]], "tokens": n}   -> {"tokens": [[ids]]}
    {"kind": "prefill", "prompts": [[ids]]}               -> {"seconds": s}, to each prompt's first token, one by one
    {"kind": "decode", "prompts": [[ids]], "tokens": n}   -> {"seconds": s}, for n tokens of each, all together, from
                                                             when every prompt has its first token

An empty line ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

Prompts = list[list[int]]


class Clock:
    """The seconds of what was timed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Clock:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


class Engine(Protocol):
    def greedy(self, prompts: Prompts, tokens: int) -> Prompts:
        """The most likely `tokens` tokens after each prompt, end tokens among them."""
        ...

    def prefill(self, prompt: list[int], clock: Clock) -> None:
        """Nothing of earlier prompts may be used; the clock runs until the first token is known."""
        ...

    def decode(self, prompts: Prompts, tokens: int, clock: Clock) -> None:
        """The clock runs for `tokens` tokens of every prompt, all decoded together."""
        ...


def serve(engine: Callable[[], Engine]) -> None:
    """Answer until told to stop. Whatever else is printed goes to standard error."""
    answers = _own_stdout()
    opened = engine()
    _say(answers, {"ready": True, "pid": os.getpid()})
    for line in sys.stdin:
        if not line.strip():
            return
        _say(answers, _answer(opened, json.loads(line)))


def _answer(engine: Engine, question: dict[str, Any]) -> dict[str, Any]:
    clock = Clock()
    prompts: Prompts = question["prompts"]
    if question["kind"] == "greedy":
        return {"tokens": engine.greedy(prompts, question["tokens"])}
    if question["kind"] == "prefill":
        for prompt in prompts:
            engine.prefill(prompt, clock)
    else:
        engine.decode(prompts, question["tokens"], clock)
    return {"seconds": clock.seconds}


def _own_stdout() -> TextIO:
    """Libraries print what they like to descriptor 1; only answers may arrive there."""
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return kept


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
