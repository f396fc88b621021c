"""API keys: made once, found by their hash, read again when the file changes, and nowhere to be seen."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from deployments.api import build_api
from deployments.keyring import Keyring
from deployments.router import Client
from fettle import keys
from fettle.cli import app
from fettle.errors import AuthError, KeyFileError
from fettle.family import Family
from fettle.key_terms import KeyTerms
from fettle.keys import KeyRecord, NewKey, Quotas
from fettle.limits import KeyLimits
from fettle.usage import Usage
from tests.fakes import classify_task, make_fake_family
from tests.inprocess import client_of, make_router

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
ASK = {"model": "sections", "input": "the fox"}


def made(name: str = "search", quotas: Quotas | None = None, expires: datetime | None = None, **terms: float) -> NewKey:
    return keys.create(KeyTerms(name=name, **terms), quotas or Quotas(), expires, NOW)


def write(path: Path, *new: NewKey) -> Path:
    with keys.changing(path) as replace:
        replace([each.record for each in new])
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in ("keys", *arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_key_is_found_and_no_other():
    ann, ben = made("ann"), made("ben")
    records = {each.record.id: each.record for each in (ann, ben)}
    assert keys.find(records, ann.key.encode()) == ann.record
    assert keys.find(records, ben.key.encode()) == ben.record
    mixed = f"fettle-{ann.record.id}-{ben.key.split('-', 2)[2]}"
    for wrong in (
        "",
        "fettle",
        "fettle--",
        ann.key[:-1],
        ann.key + "x",
        ann.key.upper(),
        mixed,
        f"fettle-{ann.record.id}",
    ):
        assert keys.find(records, wrong.encode()) is None
    assert keys.find(records, b"\xff\xfe-\xff-\xff") is None


def test_keys_are_long_and_all_different():
    some = [made() for _ in range(100)]
    assert len({each.key for each in some}) == len({each.record.salt for each in some}) == 100
    # 32 random bytes.
    assert all(len(each.key.split("-", 2)[2]) == 43 for each in some)


def test_neither_the_file_nor_any_representation_holds_the_key(tmp_path):
    new = made()
    path = write(tmp_path / "keys.json", new)
    secret = new.key.split("-", 2)[2]
    for text in (path.read_text(), repr(new.record), repr(keys.read(path)), str(new.record.model_dump())):
        assert secret not in text
    assert new.record.sha256 not in repr(new.record)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b"{",
        b'{"schema_version": 2, "keys": []}',
        b'{"keys": [{"name": "a"}]}',
        b'{"keys": [], "more": 1}',
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "keys.json"
    path.write_bytes(damage)
    with pytest.raises(KeyFileError, match=r"keys\.json"):
        keys.read(path)


def test_a_wrong_field_is_named_and_the_hashes_are_not(tmp_path):
    path = write(tmp_path / "keys.json", made("a"), made("b"))
    content = json.loads(path.read_text())
    hashes = [key["sha256"] for key in content["keys"]]
    content["keys"][1]["name"] = "a"
    path.write_text(json.dumps(content))
    with pytest.raises(KeyFileError, match="same name") as refused:
        keys.read(path)
    content["keys"][0]["weight"] = -1
    path.write_text(json.dumps(content))
    with pytest.raises(KeyFileError, match="weight") as refused_too:
        keys.read(path)
    assert not any(hash in str(error.value) for hash in hashes for error in (refused, refused_too))


@pytest.mark.anyio
async def test_the_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path, caplog):
    ann, ben = made("ann"), made("ben")
    path = write(tmp_path / "keys.json", ann)
    ring = Keyring(path=path)
    first = ring.find(ann.key.encode())
    first.limits.enter()
    with pytest.raises(AuthError):
        ring.find(ben.key.encode())
    again = keys.NewKey(ann.key, ann.record.model_copy(update={"max_concurrent": 1}))
    write(path, again, ben)
    await ring.refresh()
    assert ring.find(ben.key.encode()).name == "ben"
    # What ran before the change counts against the new limit.
    assert ring.find(ann.key.encode()).limits.wait_s(0.0) == 1
    path.write_text("{")
    for _ in range(3):
        await ring.refresh()
    assert ring.find(ben.key.encode()).name == "ben"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "keys.json" in caplog.text
    path.unlink()
    await ring.refresh()
    assert ring.find(ben.key.encode()).name == "ben"
    write(path, ben)
    await ring.refresh()
    with pytest.raises(AuthError):
        ring.find(ann.key.encode())


def test_expired_and_revoked_keys_are_refused_by_the_clock(tmp_path):
    ends = NOW + timedelta(hours=1)
    short, gone = made("short", expires=ends), made("gone")
    revoked = NewKey(gone.key, gone.record.model_copy(update={"revoked": NOW}))
    now = NOW.timestamp()
    ring = Keyring(path=write(tmp_path / "keys.json", short, revoked), clock=lambda: now)
    assert ring.find(short.key.encode()).name == "short"
    with pytest.raises(AuthError, match="revoked"):
        ring.find(gone.key.encode())
    now = ends.timestamp()
    with pytest.raises(AuthError, match="expired"):
        ring.find(short.key.encode())


def test_keys_of_the_configuration_and_of_the_file_go_together(tmp_path):
    new = made("filed")
    ring = Keyring({"plain-key": Client("plain")}, write(tmp_path / "keys.json", new))
    assert ring.find(b"plain-key").name == "plain"
    assert ring.find(new.key.encode()).name == "filed"
    with pytest.raises(KeyFileError, match="plain"):
        Keyring({"plain-key": Client("plain")}, write(tmp_path / "other.json", made("plain")))


def test_a_file_without_keys_opens_nothing(tmp_path):
    ring = Keyring(path=write(tmp_path / "keys.json"))
    assert not ring.is_open
    with pytest.raises(AuthError):
        ring.find(b"")


def test_each_router_enforces_its_share(tmp_path):
    new = made(max_concurrent=8, tokens_per_second=100.0)
    ring = Keyring(path=write(tmp_path / "keys.json", new), routers=4)
    limits = ring.find(new.key.encode()).limits
    assert (limits.max_concurrent, limits.tokens_per_second) == (2, 25.0)
    assert isinstance(limits, KeyLimits)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_fake_family(tmp_path_factory.mktemp("family"), name="sections", task=classify_task())


async def ask(client: httpx.AsyncClient, key: str) -> httpx.Response:
    return await client.post("/classify", json=ASK, headers={"authorization": f"Bearer {key}"})


@pytest.mark.anyio
async def test_a_quota_is_a_429_that_says_when_and_whose(family, tmp_path):
    few, many = made("few", Quotas(requests_per_day=2)), made("many")
    path = write(tmp_path / "keys.json", few, many)
    ring = Keyring(path=path, usage=Usage(), clock=NOW.timestamp)
    async with client_of(build_api(make_router([family]), ring)) as client:
        assert [(await ask(client, few.key)).status_code for _ in range(3)] == [200, 200, 429]
        refused = await ask(client, few.key)
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
        assert "'few'" in error["message"]
        assert "2 requests of this day" in error["message"]
        assert refused.headers["retry-after"] == str(12 * 3600)
        assert (await ask(client, many.key)).status_code == 200
        assert (await ask(client, few.key + "x")).status_code == 401
        for reply in (refused, await client.get("/stats", headers={"authorization": f"Bearer {many.key}"})):
            assert few.key not in reply.text


def test_the_commands(tmp_path):
    file = tmp_path / "keys.json"
    key = run("create", "search", "--file", file, "--tokens-per-day", 1000, "--expires", "90d").strip()
    other = run("create", "other", "--file", file).strip()
    records = {record.id: record for record in keys.read(file).keys}
    record = keys.find(records, key.encode())
    assert record is not None
    assert (record.name, record.quotas.tokens_per_day) == ("search", 1000)
    assert record.expires is not None
    listed = json.loads(run("list", "--file", file, "--json"))
    assert [(each["name"], each["state"]) for each in listed] == [("search", "active"), ("other", "active")]
    table = run("list", "--file", file)
    assert "of 1000" in table
    for secret in (key, other, record.sha256, record.salt):
        assert secret not in table
        assert secret not in json.dumps(listed)
    run("revoke", "other", "--file", file)
    run("extend", "search", "--file", file, "--expires", "never")
    listed = json.loads(run("list", "--file", file, "--json"))
    assert [(each["state"], each["expires"]) for each in listed] == [("active", None), ("revoked", None)]
    run("remove", "other", "--file", file)
    assert [each.name for each in keys.read(file).keys] == ["search"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "search"), "there is a key 'search'"),
        (("create", "../x"), "name"),
        (("create", "x", "--weight", "0"), "weight"),
        (("create", "x", "--expires", "soon"), "--expires"),
        (("create", "x", "--expires", "2020-01-01"), "past"),
        (("revoke", "nobody"), "no key 'nobody'"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, arguments, said):
    file = tmp_path / "keys.json"
    run("create", "search", "--file", file)
    before = file.read_bytes()
    result = CliRunner().invoke(app, ["keys", *arguments, "--file", str(file)])
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert file.read_bytes() == before


def test_a_record_is_not_what_a_key_may_be_made_of():
    assert not set(KeyRecord.model_fields) & {"key", "secret"}
