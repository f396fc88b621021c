"""Replicas of a family at a URL run where they should, and their files come to a node once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.fakes import FakeVariant, make_fake_family, make_point, make_step
from tests.integration.placed import FOUND
from tests.integration.service import KEPT, ROOT

pytestmark = pytest.mark.long


def test_cpu_variants_keep_off_the_accelerator_and_files_come_once(tmp_path: Path):
    steps = [make_step("small", 0.5), make_step("zoned", 0.5), make_step("big")]
    variants = [FakeVariant(name) for name in ("big", "small", "zoned")]
    family = make_fake_family(tmp_path / "family", variants=variants, points=[make_point("p", 0.01, *steps)])
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(family.directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    done = subprocess.run(
        [*KEPT, sys.executable, "-m", "tests.integration.placed", url, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    server.shutdown()
    [found] = [line for line in done.stdout.splitlines() if line.startswith(FOUND)] or [done.stderr[-3000:]]
    placed = json.loads(found.removeprefix(FOUND))
    assert placed["where"] == {"fake.big": ["gpu"], "fake.small": ["cpu", "cpu"], "fake.zoned": ["cpu"]}
    assert len(placed["copies"]) == 3
    assert sorted(path for path in asked if path.endswith("weights.bin")) == [
        f"/variants/{name}/weights.bin" for name in ("big", "small", "zoned")
    ]
