"""What is added to the configuration that Ray writes for HAProxy, checked with Ray's template and HAProxy itself."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions

from deployments import haproxy
from deployments.fastpath import WRAPPER, available, guard
from deployments.haproxy import MARK, SECRET_HEADER, Front, hardened

pytestmark = pytest.mark.skipif(not available(), reason="Ray ships no HAProxy for this platform")

SECRET = "0123456789abcdef"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The configuration as the installed version of Ray writes it."""
    path = tmp_path / "haproxy.cfg"
    settings = HAProxyConfig(
        socket_path=str(tmp_path / "admin.sock"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "server-state"),
        http_options=HTTPOptions(host="127.0.0.1", port=8000),
        metrics_port=9101,
        stats_port=8404,
    )
    HAProxyApi(settings, config_file_path=str(path))._generate_config_file_internal()
    return path


def lines_of(config: str, section: str) -> list[str]:
    """The lines of one section."""
    found, inside = [], False
    for line in config.splitlines():
        if line and not line[0].isspace():
            inside = line.strip() == section
        elif inside:
            found.append(line.strip())
    return found


def test_time_limits_loopback_and_the_secret_are_added(written):
    before, after = written.read_text(), hardened(written.read_text(), Front("unused"), SECRET)
    assert "timeout http-request" not in before
    defaults = lines_of(after, "defaults")
    assert [line for line in defaults if line.startswith("timeout client")] == [
        f"timeout client {haproxy.SILENT_CLIENT_S}s"
    ]
    assert f"timeout http-request {haproxy.HEADER_TIMEOUT_S}s" in defaults
    assert f"http-request set-header {SECRET_HEADER} {SECRET}" in lines_of(after, "frontend http_frontend")
    assert "bind 127.0.0.1:9101" in lines_of(after, "frontend prometheus")
    assert "bind 127.0.0.1:8404" in lines_of(after, "listen stats")
    assert "bind 127.0.0.1:8000" in lines_of(after, "frontend http_frontend")


def test_everything_else_stays(written):
    before = written.read_text().splitlines()
    after = hardened(written.read_text(), Front("unused", private=False), SECRET).splitlines()
    gone = [line.strip() for line in before if line not in after]
    assert all(line.startswith(("timeout client ", "errorfile ")) for line in gone), gone


def test_once_is_enough(written):
    once = hardened(written.read_text(), Front("unused"), SECRET)
    assert once.startswith(MARK)
    assert hardened(once, Front("unused"), "another") == once


@pytest.mark.parametrize("part", ["defaults", "frontend http_frontend", "frontend prometheus", "listen stats"])
def test_a_configuration_of_another_kind_is_refused(written, part):
    config = written.read_text().replace(f"\n{part}\n", "\nbackend other\n")
    with pytest.raises(ValueError, match=part):
        hardened(config, Front("unused"), SECRET)


def test_the_wrapper_is_haproxy_with_a_completed_configuration(written, tmp_path):
    secret = guard(tmp_path)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    checked = subprocess.run([tmp_path / WRAPPER, "-c", "-f", written], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "not valid" not in checked.stderr
    assert f"{SECRET_HEADER} {secret.read_text()}" in written.read_text()
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_the_command_for_a_node_keeps_the_secret_that_is_there(tmp_path):
    (tmp_path / "proxy-secret").write_text(SECRET)
    command = [sys.executable, "-m", "deployments.fastpath", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [
        f"export RAY_SERVE_HAPROXY_BINARY_PATH={tmp_path / WRAPPER}",
        f"proxy_secret_file: {tmp_path / 'proxy-secret'}",
    ]
    assert (tmp_path / "proxy-secret").read_text() == SECRET


@pytest.mark.parametrize("secret", ["", "two words", "a\nhttp-request deny", None])
def test_without_a_secret_haproxy_does_not_start(written, tmp_path, secret):
    path = guard(tmp_path)
    if secret is None:
        path.unlink()
    else:
        path.write_text(secret)
    before = written.read_text()
    started = subprocess.run([tmp_path / WRAPPER, "-c", "-f", written], capture_output=True, text=True, check=False)
    assert started.returncode == 1
    assert "fettle: " in started.stderr
    assert written.read_text() == before


def test_errors_have_the_shape_of_all_others():
    for line in haproxy._defaults(Front("unused")):
        if "http-error" in line:
            error = json.loads(line.split("string '")[1].split("'")[0])["error"]
            assert set(error) == {"message", "type", "param", "code"}
