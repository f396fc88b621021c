"""What `fettle serve` prints: requests that the families it serves can answer."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from deployments.welcome import welcome
from fettle.config import FamilyConfig, ServeConfig
from fettle.family import Family
from tests.fakes import embed_task, make_fake_family
from tests.inprocess import client_of, make_app
from tests.texts import ScriptedSource, make_text_family, says

pytestmark = pytest.mark.anyio

URL = "http://127.0.0.1:8000"


@pytest.fixture
def families(tmp_path: Path) -> list[Family]:
    return [
        make_fake_family(tmp_path / "sections", name="sections"),
        make_fake_family(tmp_path / "vectors", name="vectors", task=embed_task()),
        make_text_family(tmp_path / "lm", name="lm"),
        make_text_family(tmp_path / "bare", name="bare", template=None),
    ]


def config_of(families: list[Family], **more: object) -> ServeConfig:
    return ServeConfig(families=[FamilyConfig(path=str(family.directory)) for family in families], **more)  # type: ignore[arg-type]


async def test_each_request_is_answered_as_it_stands(families: list[Family]):
    first, *commands = welcome(URL, config_of(families))
    assert first.startswith(f"serving at {URL}")
    assert len(commands) == len(families)
    app = make_app(families, text_source=ScriptedSource(says("an answer")))
    paths = []
    async with client_of(app) as client:
        for command in commands:
            words = shlex.split(command)
            assert words[0] == "curl"
            assert "content-type: application/json" in words
            paths.append(words[1].removeprefix(URL))
            response = await client.post(paths[-1], json=json.loads(words[words.index("-d") + 1]))
            assert response.status_code == 200, response.text
    assert paths == ["/classify", "/v1/embeddings", "/v1/chat/completions", "/v1/completions"]


def test_the_key_is_asked_for_where_one_is_needed(families: list[Family]):
    _, *commands = welcome(URL, config_of(families, api_keys=["a-secret-key"]))
    assert all(re.search(r"-H 'Authorization: Bearer KEY'", command) for command in commands)
    assert not any("secret" in command for command in commands)
