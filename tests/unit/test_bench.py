"""`fettle bench`: what is sent and when, what is made of what came back, and one load on a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from deployments.fastpath import free_port
from fettle.bench import plot, texts
from fettle.bench.arrivals import steady, times
from fettle.bench.crew import Measured
from fettle.bench.figures import Objectives, by_point, figures, part, tokens_within
from fettle.bench.http1 import Connection, Reply, Turns
from fettle.bench.load import LoadPlan, schedule
from fettle.bench.samples import Recorder, Samples, quantiles
from fettle.bench.sse import Stream
from fettle.bench.traffic import Flow, Request, encode_flows, kind_of, mix_of
from fettle.cli import app
from fettle.errors import UsageError

ROOT = Path(__file__).parents[2]
MS = 4.0
TOKENS = 5


def text_event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


def recorded(*requests: tuple[float, float, int], tags: tuple[str, ...] = ("all",)) -> Samples:
    """Of (due, ended, status); the flows in turn."""
    recorder = Recorder(0, ["x-fettle-point", "x-fettle-variant"])
    for number, (due, ended, status) in enumerate(requests):
        headers = {b"x-fettle-variant": b"v", b"x-fettle-point": b"p" if number % 2 else b""}
        reply = Reply(status, headers, b"") if status else None
        recorder(due, due, ended, Request(b"", number % len(tags), number), reply)
    return recorder.samples(tags, 0.0, 0.0)


def texted(*requests: tuple[float, list[float], int]) -> Samples:
    """Of streams: (due, when text came, tokens)."""
    recorder = Recorder(0)
    for due, came, tokens in requests:
        stream = Stream(came, tokens, done=True)
        recorder(due, due, came[-1], Request(b""), Reply(200, {}, b""), stream)
    return recorder.samples(["all"], 0.0, 0.0)


# What is sent


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/embeddings", "openai"),
        ("/embed", "tei"),
        ("/predict", "tei"),
        ("/classify", "classify"),
        ("/v1/completions", "completions"),
        ("/v1/chat/completions/", "chat"),
    ],
)
def test_the_path_says_what_is_sent(path, kind):
    assert kind_of(f"http://host:1{path}") == kind


def test_a_mix_becomes_flows():
    exact, loose, named = mix_of("exact=0.2, 0.01=0.7,gold")
    assert (exact.max_disagreement, exact.share) == ("exact", 0.2)
    assert (loose.max_disagreement, loose.share) == (0.01, 0.7)
    assert (named.max_disagreement, named.share) == ("gold", 1.0)


@pytest.mark.parametrize("text", ["exact=0", "exact=x", "exact=nan", "a=1,a=2", ""])
def test_a_bad_mix_is_refused(text):
    with pytest.raises(UsageError, match="--mix"):
        mix_of(text)


def test_a_flow_says_its_class_and_a_text_its_length():
    [[request]] = encode_flows(
        "http://h/v1/completions", "completions", "m", ["hi"], [Flow(max_disagreement=0.01)], (), [{"max_tokens": 3}]
    )
    body = json.loads(request.data.partition(b"\r\n\r\n")[2])
    assert body == {
        "model": "m",
        "prompt": "hi",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 3,
        "max_disagreement": 0.01,
    }


def test_texts_are_read_from_lines_and_from_jsonl(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\n\ntwo words\n")
    lines.write_text('{"text": "one"}\n{"prompt": "two"}\n')
    assert texts.read_texts(plain) == ["one", "two words"]
    assert texts.read_texts(lines) == ["one", "two"]
    lines.write_text('{"text": "one"}\n{"title": "two"}\n')
    with pytest.raises(UsageError, match="line 2 has no text"):
        texts.read_texts(lines)


def test_made_texts_have_the_words_asked_for_and_follow_the_seed():
    made = texts.synthetic_texts((3, 9), seed=1, count=200)
    assert {len(text.split()) for text in made} == set(range(3, 10))
    assert made == texts.synthetic_texts((3, 9), seed=1, count=200)
    assert made != texts.synthetic_texts((3, 9), seed=2, count=200)


def test_a_trace_keeps_its_gaps_at_its_speed(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 14, "text": "b", "max_tokens": 7}\n{"at": 10}\n{"at": 11, "max_disagreement": 0.02}\n'
    )
    rows = texts.read_trace(path, speed=2.0)
    assert [row.at for row in rows] == [0.0, 0.5, 2.0]
    assert (rows[1].max_disagreement, rows[2].text, rows[2].max_tokens) == (0.02, "b", 7)
    path.write_text('{"text": "when?"}\n')
    with pytest.raises(UsageError, match="line 1"):
        texts.read_trace(path)


def test_poisson_arrivals_are_poisson():
    gaps = np.diff(list(times(steady(200.0, 100.0), "poisson", "7")))
    assert len(gaps) == pytest.approx(20_000, abs=600)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    # Memoryless: as many are longer than the mean as an exponential law says.
    assert (gaps > 1 / 200).mean() == pytest.approx(np.exp(-1), abs=0.02)


def test_constant_arrivals_are_constant():
    assert np.diff(list(times(steady(50.0, 2.0), "constant", "7"))) == pytest.approx(0.02)


def test_clients_share_one_schedule():
    plan = LoadPlan("http://h/embed", None, rate=300.0, flows=(Flow("a", 1), Flow("b", 3)), seed=5)
    whole = list(itertools.islice(schedule(plan, 7), 600))
    parts = [itertools.islice(schedule(plan, 7), mine, 600, 3) for mine in range(3)]
    assert sorted(itertools.chain(*parts)) == whole
    assert sum(flow for _, flow, _ in whole) / 600 == pytest.approx(0.75, abs=0.06)


def test_a_plan_survives_its_way_to_the_client():
    plan = LoadPlan(
        "http://h/embed",
        "m",
        synthetic=(1, 2),
        flows=(Flow("a", profile=((0.0, 1.0), (2.0, 3.0))),),
        max_tokens=(3, 4),
        body={"temperature": 0},
        keep=("x",),
        part=(1, 2),
        trace=Path("t"),
    )
    assert LoadPlan.from_json(plan.as_json()) == plan


# What came back


def test_a_stream_is_read_across_pieces_and_coalesced_tokens():
    stream = Stream()
    texts = text_event(" a") + text_event("") + text_event(" b c")
    for begin in range(0, len(texts), 7):
        stream.feed(texts[begin : begin + 7])
    assert (len(stream.came), stream.length, stream.problem) == (2, 2, "stream cut off")
    stream.feed(b"data: [DONE]\n\n")
    assert stream.problem == ""


def test_a_stream_that_has_told_its_usage_is_whole_without_an_end_mark():
    stream = Stream()
    stream.feed(text_event(" a") + text_event(" b c") + b'data: {"usage": {"completion_tokens": 3}}\r\n\r\n')
    assert (len(stream.came), stream.length, stream.problem) == (2, 3, "")


def test_an_error_in_a_stream_is_no_answer():
    stream = Stream()
    stream.feed(text_event(" a") + b'data: {"error": {"message": "gone"}}\n\ndata: [DONE]\n\n')
    assert stream.problem == "error in the stream"
    recorder = Recorder(0)
    recorder(0.0, 0.0, 1.0, Request(b""), Reply(200, {}, b""), stream)
    found = part(recorder.samples(["all"], 0.0, 0.0), 1.0, None)
    assert (found["rps"], found["problems"]) == (0.0, {"error in the stream": 1})


def test_counts_by_kind_hide_nothing():
    samples = recorded((0.0, 0.01, 200), (0.1, 0.13, 200), (0.2, 0.21, 429), (0.3, 0.9, 0), (0.4, 0.5, 503))
    found = part(samples, 2.0, None)
    assert found["statuses"] == {"200": 2, "429": 1, "503": 1, "lost": 1}
    assert found["problems"] == {"connection broke": 1}
    assert (found["rps"], found["p50_ms"], found["max_ms"], found["mean_ms"]) == (1.0, 10.0, 30.0, 20.0)


def test_quantiles_are_of_the_nearest_rank():
    ranks = quantiles(np.arange(1, 1001, dtype=float))
    assert ranks == {"p50_ms": 500, "p90_ms": 900, "p95_ms": 950, "p99_ms": 990, "p99.9_ms": 999, "max_ms": 1000}


def test_times_of_generated_text():
    samples = texted((0.0, [0.2, 0.3, 0.5], 5), (1.0, [1.1], 1))
    found = part(samples, 2.0, Objectives.of("ttft=150,tpot=80"))
    assert (found["ttft_ms"]["p50_ms"], found["ttft_ms"]["max_ms"]) == (100.0, 200.0)
    assert found["tpot_ms"]["max_ms"] == pytest.approx(75.0)
    assert found["inter_token_ms"]["max_ms"] == pytest.approx(200.0)
    assert (found["tokens"], found["tokens_a_piece"]) == (6, 1.5)
    # The first came late, the second has no time between tokens.
    assert (found["goodput_rps"], found["kept"]) == (0.5, 0.5)


def test_tokens_count_where_they_came():
    samples = texted((-1.0, [-1.0, 1.0], 10), (0.5, [0.6, 0.8], 4), (1.9, [1.9, 2.1], 8))
    assert tokens_within(samples, 2.0) == pytest.approx(5 + 4 + 4)


def test_gaps_stay_with_their_requests(tmp_path):
    samples = texted((0.0, [0.1, 0.2], 2), (0.0, [0.3], 1), (0.0, [0.4, 0.7, 1.4], 3))
    assert samples.where(samples.tokens == 3).gaps == pytest.approx([0.3, 0.7])
    samples.save(tmp_path / "s.npz")
    loaded = Samples.load(tmp_path / "s.npz")
    whole = Samples.joined([loaded.where(loaded.tokens != 2), loaded.where(loaded.tokens == 2)])
    assert whole.ended.tolist() == [0.2, 0.3, 1.4]
    assert whole.gaps == pytest.approx([0.1, 0.3, 0.7])


def test_by_operating_point_and_where_there_was_none_by_variant():
    found = by_point(recorded((0, 0.1, 200), (0, 0.2, 200), (0, 0.3, 200)), 1.0, None)
    assert {name: row["requests"] for name, row in found.items()} == {"p": 1, "v": 2}


def client(**changes: object) -> dict[str, object]:
    said = {"window_s": 2.0, "client_cpu_s": 0.2, "send_lag_p99_ms": 0.1, "loop_lag_p99_ms": 0.1, "refusal": ""}
    said |= {"out_of_connections": 0, "connections_failed": {}, "checked": {"replies": 0, "problems": []}}
    return said | changes


def measured(*clients: dict[str, object]) -> Measured:
    samples = recorded((-0.5, 0.1, 200), (0.1, 0.2, 200), (1.0, 1.1, 200), (1.9, 2.5, 200), tags=("a", "b"))
    plan = LoadPlan("http://h/embed", None, rate=1.0, flows=(Flow("a"), Flow("b")), seconds=2.0)
    return Measured(plan, samples, 2.0, list(clients))


def test_an_open_loop_counts_what_was_due_in_the_window():
    found = figures(measured(client()))
    assert (found["requests"], found["max_ms"]) == (3, 600.0)
    assert {name: row["requests"] for name, row in found["classes"].items()} == {"a": 1, "b": 2}
    assert found["warnings"] == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"client_cpu_s": 1.9}, "bottleneck"),
        ({"loop_lag_p99_ms": 40.0}, "late"),
        ({"out_of_connections": 3}, "3 requests waited"),
        ({"connections_failed": {"ConnectionRefusedError": 2}}, "2 x ConnectionRefusedError"),
        ({"refusal": "503: full"}, "503: full"),
    ],
)
def test_what_makes_figures_doubtful_is_said(changes, word):
    found = figures(measured(client(), client(**changes)))
    assert [word in line for line in found["warnings"]] == [True]


def test_the_drawing_holds_a_line_for_each_figure():
    drawing = plot.draw(figures(measured(client())), "a <load>")
    assert drawing.count("<polyline") == 4
    assert "a &lt;load&gt;" in drawing


@pytest.mark.parametrize("text", ["ttft", "latency=0", "speed=3", "ttft=5,"])
def test_bad_objectives_are_refused(text):
    with pytest.raises(UsageError, match="--goodput"):
        Objectives.of(text)


# The command


@pytest.fixture(scope="module")
def constant() -> Iterator[str]:
    """A server that answers everything after the same time."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.constant_server", str(port), "--ms", str(MS), "--tokens", str(TOKENS)]
    with subprocess.Popen(command, cwd=ROOT) as server:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield url
        server.terminate()


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_a_closed_loop_from_two_processes(constant, tmp_path):
    drawing = tmp_path / "plot.svg"
    ran = bench(
        f"{constant}/classify", "--connections", 6, "--seconds", 3, "--warm-up", 0.2, "--processes", 2,
        "--mix", "exact=1,0.01=3", "--goodput", "latency=10000", "--plot", drawing, "--json",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert set(found["statuses"]) == {"200"}
    assert found["p50_ms"] >= MS
    # Little's law: six clients that each wait for an answer.
    assert found["rps"] * found["mean_ms"] / 1000 == pytest.approx(6, rel=0.1)
    assert found["client"]["clients"] == 2
    assert found["client"]["checked"] == {"replies": 8, "problems": []}
    assert found["goodput_rps"] == found["rps"]
    assert set(found["classes"]) == {"exact", "0.01"}
    assert drawing.read_text().startswith("<svg")


def test_a_trace_of_streams(constant, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"at": n / 100, "text": f"text {n}"}) + "\n" for n in range(40)))
    ran = bench(f"{constant}/v1/completions", "--trace", trace, "--json", "--processes", 1)
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["requests"] == 40
    assert found["tokens"] == 40 * TOKENS
    assert found["ttft_ms"]["p50_ms"] >= MS
    assert found["p50_ms"] >= TOKENS * MS
    assert found["tpot_ms"]["p50_ms"] >= MS / 2


def test_so_many_requests_as_a_table(constant):
    ran = bench(f"{constant}/embed", "--requests", 30, "--connections", 3, "--processes", 3)
    assert ran.exit_code == 0, ran.output
    assert "30 x 200" in ran.stdout


def test_ctrl_c_prints_what_was_measured_so_far(constant):
    command = [sys.executable, "-m", "fettle.cli", "bench", f"{constant}/classify", "--rate", "50", "--seconds", "600"]
    with subprocess.Popen(
        [*command, "--warm-up", "0.1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore it, and what they start with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        # The second line of progress comes after the window has opened.
        assert running.stderr is not None
        [next(running.stderr) for _ in range(2)]
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "x 200" in said
    assert "interrupted" in said


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["http://127.0.0.1:9/embed", "--model", "m"], 1, "no answer from"),
        (["localhost:8000"], 2, "no address"),
        (["http://127.0.0.1:9/nothing"], 2, "its path"),
        (["http://127.0.0.1:9/embed", "--rate", "-1"], 2, "--rate"),
        (["http://127.0.0.1:9/embed", "--words", "9:3"], 2, "--words"),
        (["http://127.0.0.1:9/embed", "--body", "[]"], 2, "--body"),
        (["http://127.0.0.1:9/embed", "--shape", "odd"], 2, "--shape"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, status, word):
    ran = bench(*arguments)
    assert ran.exit_code == status
    assert word in ran.stderr
    assert ran.stdout == ""


@pytest.mark.anyio
async def test_replies_that_come_together_have_one_time_whoever_is_parsed_last():
    """Over sockets; what a reply makes of the client keeps it busy, as a check of its body would."""
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    seen: list[tuple[str, float, float]] = []
    turns, done = Turns(), asyncio.Event()

    def answered(ticket: str, _: Reply | None, at: float) -> None:
        seen.append((ticket, at, time.perf_counter()))
        time.sleep(0.005)
        if len(seen) % 2 == 0:
            done.set()

    servers, connections = [], []
    for _ in range(2):
        server, client = socket.socketpair()
        made = partial(Connection, lambda _: None, answered, lambda _: None, turns)
        _, connection = await asyncio.get_running_loop().create_connection(made, sock=client)
        servers.append(server)
        connections.append(connection)
    for number in range(2):
        done.clear()
        for connection in connections:
            connection.send(b"GET", f"round {number}")
        for server in servers:
            server.sendall(reply)
        await done.wait()
    for end in (*connections, *servers):
        end.close()
    assert [ticket for ticket, *_ in seen] == ["round 0"] * 2 + ["round 1"] * 2
    for (_, first, parsed_first), (_, second, parsed_second) in (seen[:2], seen[2:]):
        assert first == second <= parsed_first
        assert parsed_second >= first + 0.005
    assert seen[2][1] > seen[1][2]
