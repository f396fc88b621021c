"""`fettle bench` on the service: encoders by class and operating point, streams of text."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.service import ROOT, Service

pytestmark = pytest.mark.slow


def bench(*arguments: object) -> dict[str, object]:
    command = [sys.executable, "-m", "fettle.cli", "bench", *map(str, arguments), "--json"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, object] = json.loads(ran.stdout)
    return found


def test_a_load_of_texts_is_counted_as_the_service_counts_it(served: Service):
    before = served.info("sections", "fp32")["rows"]
    found = bench(f"{served.url}/classify", "--model", "sections:fp32", "--requests", 200, "--words", "3:30")
    assert found["statuses"] == {"200": 200}
    assert list(found["points"]) == ["fp32"]
    assert found["client"]["checked"]["problems"] == []
    # One more asked whether the service is there.
    assert served.info("sections", "fp32")["rows"] - before == 201


def test_streams_have_the_tokens_that_were_asked_for(served: Service):
    found = bench(
        f"{served.url}/v1/completions", "--model", "lm:int4", "--requests", 12, "--connections", 4,
        "--words", 5, "--max-tokens", 6, "--body", '{"ignore_eos": true}',
    )  # fmt: skip
    assert found["statuses"] == {"200": 12}
    assert found["tokens"] == 72
    assert found["ttft_ms"]["p50_ms"] <= found["p50_ms"]
