"""A service stops cleanly on Ctrl-C, and does not start where it cannot."""

from __future__ import annotations

import os
import signal
import socket

import httpx
import psutil
import pytest

from deployments.fastpath import is_free
from deployments.server import ServerOptions, running
from fettle.config import FamilyConfig, ReplicaConfig, ServeConfig
from fettle.errors import FamilyError, UsageError
from tests.fakes import make_fake_family
from tests.integration.service import STOP_S, service, wait_until


@pytest.mark.slow
def test_ctrl_c_stops_everything_and_exits_with_zero(tmp_path):
    make_fake_family(tmp_path / "family")
    config = ServeConfig(
        families=[FamilyConfig(path=str(tmp_path / "family"))], replicas=ReplicaConfig(min_replicas=1, max_replicas=1)
    )
    with service(config, tmp_path / "log", kept=False) as started:
        assert httpx.post(f"{started.url}/classify", json={"input": "fox"}, timeout=60).status_code == 200
        everything = [*started.descendants(), psutil.Process(started.process.pid)]
        assert any("ray::ServeReplica" in " ".join(process.cmdline()) for process in everything)
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(STOP_S) == 0, started.tail()
        assert wait_until(lambda: not any(process.is_running() for process in everything), 20), [
            process for process in everything if process.is_running()
        ]
        assert is_free("127.0.0.1", started.port)
        assert "Traceback" not in started.tail()


def test_a_port_in_use_is_one_clear_line(tmp_path):
    make_fake_family(tmp_path / "family")
    config = ServeConfig(families=[FamilyConfig(path=str(tmp_path / "family"))])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} .* is in use"), running(config, ServerOptions(port=port)):
            pass


@pytest.mark.parametrize("damage", ["nothing there", "unknown variant"])
def test_a_bad_family_is_refused_before_anything_starts(tmp_path, damage, monkeypatch):
    # `running` prepares the environment of the Ray that it would start; the tests' own must stay as it is.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    if damage == "unknown variant":
        make_fake_family(tmp_path / "family")
    family = FamilyConfig(path=str(tmp_path / "family"), variants=["int4"])
    with pytest.raises(FamilyError), running(ServeConfig(families=[family]), ServerOptions(port=0)):
        pass
