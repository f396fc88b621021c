"""API keys on a running service: taken up, used up and revoked without a restart, and written nowhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.hostile import ask, attack, judge
from benchmarks.hostile_corpus import corpus
from fettle.config import FamilyConfig, KeyConfig, ReplicaConfig, ServeConfig
from tests.fakes import classify_task, make_fake_family
from tests.integration.service import ROOT, Service, service, wait_until

pytestmark = pytest.mark.long

PLAIN = "plain-key-of-the-configuration"
ASK = {"model": "sections", "input": "the fox"}


def keys(*arguments: object) -> str:
    command = [sys.executable, "-m", "fettle.cli", "keys", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def guarded(file: Path) -> Iterator[tuple[Service, str]]:
    """A service with two routers, and a key that has no limits."""
    key = keys("create", "anybody", "--file", file)
    make_fake_family(file.parent / "sections", name="sections", task=classify_task())
    config = ServeConfig(
        families=[FamilyConfig(path=str(file.parent / "sections"))],
        replicas=ReplicaConfig(min_replicas=1, max_replicas=1),
        routers=2,
        router_cpus=0.5,
        keys_file=str(file),
        api_keys=[KeyConfig(key=PLAIN, name="plain")],
    )
    with service(config, file.parent / "log") as running:
        yield running, key


def status(running: Service, key: str) -> int:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{running.url}/classify", json=ASK, headers=headers, timeout=30).status_code


def test_keys_come_and_go_while_it_runs(guarded, file):
    running, key = guarded
    assert [status(running, each) for each in (key, PLAIN, "wrong", key + "x")] == [200, 200, 401, 401]
    new = keys("create", "late", "--file", file)
    assert wait_until(lambda: [status(running, new) for _ in range(8)] == [200] * 8, 30)
    before = file.read_text()
    file.write_text("{ this is no JSON")
    assert wait_until(lambda: "the API keys stay as they were" in logs(running), 30)
    assert status(running, new) == 200
    file.write_text(before)
    keys("revoke", "late", "--file", file)
    assert wait_until(lambda: [status(running, new) for _ in range(8)] == [401] * 8, 30)
    assert status(running, key) == 200


def test_a_quota_is_one_for_all_routers_and_is_counted(guarded, file):
    running, _ = guarded
    few = keys("create", "few", "--file", file, "--requests-per-day", 20)
    # Asked one by one a second apart each router knows of the other: 20, and no 21st.
    assert wait_until(lambda: status(running, few) == 200, 30)
    answers = []
    with httpx.Client(headers={"authorization": f"Bearer {few}"}) as client:
        while 429 not in answers and len(answers) < 60:
            answers.append(client.post(f"{running.url}/classify", json=ASK).status_code)
            wait_until(lambda: False, 0.3)
    assert answers.count(200) <= 24, answers
    assert answers[-1] == 429
    assert wait_until(lambda: _used(file, "few") == answers.count(200) + 1, 10)


def _used(file: Path, name: str) -> int:
    shown = json.loads(keys("list", "--file", file, "--json"))
    return next(each["used"]["today"]["requests"] for each in shown if each["name"] == name)


def test_after_a_hostile_run_no_secret_is_in_any_log_or_reply(guarded, file):
    running, key = guarded
    before = ask(running.port, key)
    assert before[0] == 200
    attacks = corpus(key)
    with ThreadPoolExecutor(8) as pool:
        outcomes = pool.map(lambda each: attack(running.port, each.send, to_the_end=each.closes), attacks)
        for each, outcome in zip(attacks, outcomes, strict=True):
            assert judge(each, outcome) == []
            assert key.encode() not in outcome.reply
    assert ask(running.port, key) == before
    record = next(each for each in json.loads(file.read_text())["keys"] if each["name"] == "anybody")
    secrets = [key, key.split("-", 2)[2], PLAIN, record["sha256"], record["salt"], proxy_secret(running)]
    headers = {"authorization": f"Bearer {key}"}
    shown = [httpx.get(f"{running.url}{path}", headers=headers).text for path in ("/info", "/stats", "/quality", "/")]
    for secret in secrets:
        assert not [text[:80] for text in shown if secret in text]
        assert not [path for path in log_files(running) if secret.encode() in path.read_bytes()], secret[:8]


def proxy_secret(running: Service) -> str:
    """From where the routers have it."""
    (config,) = scratch(running).rglob("haproxy.cfg")
    line = next(line for line in config.read_text().splitlines() if "set-header x-fettle-proxy" in line)
    return line.split()[-1]


def scratch(running: Service) -> Path:
    proxy = next(each for each in running.descendants() if each.name() == "haproxy")
    command = proxy.cmdline()
    return Path(command[command.index("-f") + 1]).parents[1]


def log_files(running: Service) -> list[Path]:
    """Of the service itself and of Ray's session: everything that it writes as logs."""
    raylet = next(each for each in running.descendants() if each.name() == "raylet")
    session = next(part for part in raylet.cmdline() if "session_dir=" in part).partition("=")[2]
    found = [path for path in Path(session, "logs").rglob("*") if path.is_file()]
    found += [path for path in scratch(running).rglob("*.log") if path.is_file()]
    assert len(found) > 10
    return [running.log, *found]


def logs(running: Service) -> str:
    return "\n".join(
        path.read_text(errors="replace") for path in log_files(running) if path.suffix in (".log", ".err", "")
    )
