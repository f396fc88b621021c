"""What README.md and ARCHITECTURE.md say is so: code marked `<!-- run -->` runs, what is
marked `<!-- served -->` is answered by a service, commands and files exist.
"""

import asyncio
import re
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.fakes import make_fake_family
from tests.inprocess import listening, make_app
from tests.texts import ScriptedSource, make_text_family, says

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
TREE = ("fettle/", "optimize/", "workers/", "deployments/", "deploy/", "benchmarks/", "examples/", "tests/")
BLOCK = re.compile(r"(?:<!-- (?P<marker>\w+) -->\s*\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)

needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


@dataclass(frozen=True)
class Block:
    marker: str | None
    language: str
    code: str


def blocks() -> list[Block]:
    text = README.read_text() if README.exists() else ""
    return [Block(**match.groupdict()) for match in BLOCK.finditer(text)]


def fettle_commands() -> list[list[str]]:
    """The words of every `fettle ...` in the shell blocks, options without their values."""
    commands = []
    for block in blocks():
        if block.language in ("sh", "bash", "console"):
            for line in block.code.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|\||[;|]", line.removeprefix("$ ")):
                    words = shlex.split(part, comments=True)
                    if words[:1] == ["fettle"]:
                        commands.append(words[1:])
    return commands


@needs_readme
@pytest.mark.parametrize("block", [block for block in blocks() if (block.language, block.marker) == ("python", "run")])
def test_marked_python_runs(block, tmp_path, monkeypatch):
    make_fake_family(tmp_path / "family")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, str(README), "exec"), {"__name__": "__readme__"})


SERVED = [block for block in blocks() if block.marker == "served"]


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """A service on a port of this machine whose language model says one thing."""
    family = make_text_family(tmp_path / "lm")
    async for url in listening(make_app([family], text_source=ScriptedSource(says("an answer")))):
        yield url


@needs_readme
@pytest.mark.anyio
@pytest.mark.parametrize("block", [block for block in SERVED if block.language == "python"])
async def test_served_python_runs(block, address, capsys):
    code = compile(block.code.replace("http://localhost:8000", address), str(README), "exec")
    await asyncio.to_thread(exec, code, {"__name__": "__readme__"})
    assert capsys.readouterr().out == "an answer"


@needs_readme
@pytest.mark.anyio
@pytest.mark.parametrize("block", [block for block in SERVED if block.language == "sh"])
async def test_served_requests_are_answered(block, address):
    commands = block.code.replace("\\\n", " ").splitlines()
    assert commands
    async with httpx.AsyncClient() as client:
        for command in commands:
            words = shlex.split(command)
            assert "content-type: application/json" in words
            url, body = words[1].replace("localhost:8000", address), words[words.index("-d") + 1]
            response = await client.post(url, content=body, headers={"content-type": "application/json"})
            assert response.status_code == 200, response.text


@needs_readme
@pytest.mark.parametrize("words", fettle_commands(), ids=" ".join)
def test_every_command_and_option_exists(words, monkeypatch):
    from fettle.cli import app

    # Rich cuts long option names in a narrow terminal.
    monkeypatch.setenv("COLUMNS", "200")
    # A group of commands, such as `fettle rollout start`, is named by two words.
    groups = {group.name for group in app.registered_groups}
    command = [] if not words or words[0].startswith("-") else words[: 2 if words[0] in groups else 1]
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0, shown.output
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    offered = set(re.findall(r"--[\w-]+", re.sub(r"\x1b\[[\d;]*m", "", shown.output)))
    assert set(options) <= offered


@needs_readme
def test_the_test_command_is_marked_for_ci():
    (block,) = [block for block in blocks() if block.marker == "test"]
    assert "pytest" in block.code


@pytest.mark.parametrize("page", [README, ARCHITECTURE], ids=lambda path: path.name)
def test_every_file_named_exists(page):
    if not page.exists():
        pytest.skip(f"{page.name} is not written yet")
    text = page.read_text()
    named = {word for word in re.findall(r"`([\w./-]+)`", text) if word.startswith(TREE)}
    named |= set(re.findall(r"\]\(([\w./-]+)\)", text))
    assert [word for word in sorted(named) if not (ROOT / word).exists()] == []
