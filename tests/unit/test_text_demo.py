"""The demo of a language model: what it asks, how it judges, and that its tables can be read; over HTTP without Ray."""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from rich.console import Console

from deployments.text_source import Answering, Piece, Spent, TextCall, Votes
from examples import text_demo
from examples.text_client import ServiceError, TextClient
from examples.text_demo import NAME, TextDemoOptions, question_all, question_files, shortened, shown
from examples.text_tables import AskedTexts, report_speeds, report_ways
from fettle.errors import EngineError, OverloadedError
from fettle.extract import LabelAnswer
from fettle.family import FAMILY_FILE, Family
from fettle.generation import Finish
from tests.fakes import change_json, give_points, make_point
from tests.inprocess import listening, make_app
from tests.texts import Script, ScriptedSource, framed, make_text_family, pieces_of
from tests.unit.test_text_router import LAST, cascade

pytestmark = pytest.mark.anyio

LABELS = LabelAnswer(labels=["net", "python"])
ROWS = [{"text": f"package {number}", "label": ("net", "python")[number % 2]} for number in range(12)]
WRONG = "package 3"


@pytest.fixture
def family(tmp_path: Path) -> Family:
    made = make_text_family(tmp_path / "lm", name=NAME)
    task = made.manifest.task.model_dump(mode="json") | {"answer": LABELS.model_dump(mode="json")}
    change_json(made.directory / FAMILY_FILE, task=task)
    give_points(made.directory, [make_point("within-0.05", 0.05, cascade(0.5), LAST)])
    return Family.open(made.directory)


def script(call: TextCall) -> list[Piece]:
    """The right section, but for one question in a class; early where the client says so, or half of a vote."""
    asked = bytes(token - 4 for token in call.prompts[0].tolist() if token >= 4).decode()
    number = re.search(r"package (\d+)", asked)
    text = ROWS[int(number[1])]["label"] if number else "words " * 3
    level = call.asked.quality.tolerance
    certified = 0 < level < 1
    if certified and WRONG in asked:
        text = "net"
    finish = Finish.EARLY_ANSWER if call.early_stop else Finish.EARLY_VOTE if call.vote else Finish.STOP
    pieces = pieces_of(call, 0, text, finish=finish)
    point = "within-0.05" if certified else None
    answering = Answering(("int4" if certified else "bf16",), point, 0.041 if certified else "exact")
    votes = (Votes(5, 4),) if call.vote else ()
    return framed(pieces, answering=answering, spent=Spent(len(text), infer_ms=2.0, votes=votes))


def serving(family: Family, source: Script) -> AsyncIterator[str]:
    return listening(make_app([family], text_source=ScriptedSource(source)))


@pytest.fixture
async def url(family: Family) -> AsyncIterator[str]:
    async for address in serving(family, script):
        yield address


async def test_what_is_asked_and_shown(family: Family, url: str):
    console = Console(file=io.StringIO(), width=80)
    options = TextDemoOptions(Path("unused"), questions=len(ROWS), streams=4)
    asked, speeds = await question_all(url, family, ROWS, options, console)
    assert isinstance(console.file, io.StringIO)
    exact, level, own, vote = asked
    assert [row.wish for row in asked] == ["exact", "at most 5 %", "own early stop", "vote of 8"]
    assert (exact.bound, exact.answered, exact.early, exact.same_as_reference) == (0.0, {"bf16": 1.0}, {}, 1.0)
    # Of the bytes of "net" and "python", and the token that ends each.
    assert exact.tokens == (3 + 6) / 2 + 1
    assert (level.bound, level.answered) == (0.041, {"within-0.05": 1.0})
    assert level.same_as_reference == level.right == pytest.approx(11 / 12)
    assert (own.bound, own.early, own.tokens) == (None, {"early_answer": 1.0}, 4.5)
    assert (vote.bound, vote.early, vote.candidates) == (None, {"early_vote": 1.0}, 5.0)
    assert exact.right == own.right == vote.right == 1.0
    assert [row.variant for row in speeds] == ["bf16", "int4"]
    assert all(row.tokens_per_second > 0 and row.first_ms > 0 for row in speeds)
    report_ways(asked, options.questions, options.streams, console)
    report_speeds(speeds, console)
    said = console.file.getvalue()
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    assert "by within-0.05 (at most 4.10% differ); the archive says net" in " ".join(said.split())
    assert "own early stop: early_answer 100%; 18% of the tokens saved." in said
    assert "vote of 8: 5.0 candidates were drawn on average" in said


async def test_an_error_says_what_the_service_said(family: Family):
    def refuse(call: TextCall) -> list[Piece | Exception]:
        return [OverloadedError("the queue is full", retry_after_s=1)]

    def break_off(call: TextCall) -> list[Piece | Exception]:
        return [replace(framed(pieces_of(call, 0, "so far"))[0], finish=None), EngineError("it broke off")]

    for source, words in ((refuse, "queue is full"), (break_off, "it broke off")):
        async for address in serving(family, source):
            async with aiohttp.ClientSession(address) as session:
                client = TextClient(session)
                for asking in (client.ask, client.stream):
                    with pytest.raises(ServiceError, match=words):
                        await asking("Hi", {"model": NAME})


def test_the_longest_names_fit_into_eighty_columns():
    row = AskedTexts(
        "own early stop",
        0.00987,
        {"within-0.005": 0.75, "torch-fp32": 0.25},
        {"early_answer": 1.0},
        *(12.5, 1.0),
        *(1234.0, 1234.0, 1.0, 0.765),
    )
    console = Console(file=io.StringIO(), width=80)
    report_ways([row, row, replace(row, candidates=4.2)], 3434, 16, console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    assert "within-0.005 75%" in said


def test_the_questions_are_the_first_rows_and_always_the_same_bytes(tmp_path: Path):
    options = TextDemoOptions(tmp_path, split_rows={"validation": 3, "test": 5})
    first = {split: path.read_bytes() for split, path in question_files(options).items()}
    assert {split: path.read_bytes() for split, path in question_files(options).items()} == first
    assert set(first) == {"validation", "test"}


def test_what_is_served(family: Family):
    assert shown(family) == ["bf16", "int4"]


def test_the_model_is_in_the_package():
    assert (text_demo.MODEL / "model.safetensors").stat().st_size > 10_000_000
    assert sum(path.stat().st_size for path in text_demo.DATA.rglob("*") if path.is_file()) < 30_000_000


def test_long_descriptions_are_shortened():
    assert shortened("a " * 50, 10) == "a a a a a…"
    assert shortened("short", 10) == "short"
