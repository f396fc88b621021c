"""Requests of people who mean harm, over raw sockets: a fixed corpus, and its random mutations.

    python -m benchmarks.hostile --port 8000 --minutes 5 --seed 1 [--key KEY] [--pid PID ...]
        [--slow-readers 20 --text MODEL]

Sends to a running service and ends with one JSON line: what was sent, which statuses came, which rules were broken. The
rules: no 5xx, a connection ends within its time, an ordinary request is answered as before, no reply holds what another
client sent, and no process given by --pid grows beyond --growth-mb. --slow-readers take a byte a second of streams of
the model --text all the while: no slot may be taken at the end, though they still read, nor a connection kept.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import psutil

from benchmarks.hostile_corpus import corpus
from benchmarks.hostile_requests import CANARY, Attack, Send, plain
from benchmarks.slow_readers import SlowReaders, until_free

WITHIN_S = 40.0
READ = 65_536
QUIET_S = 2.0
FREE_WITHIN_S = 60.0


@dataclass(slots=True)
class Outcome:
    """What came back: raw bytes, how long it took, and whether the other side closed."""

    reply: bytes
    seconds: float
    closed: bool

    @property
    def statuses(self) -> list[int]:
        """Of all replies in the bytes: pipelined requests have several."""
        found = []
        for part in self.reply.split(b"HTTP/1.")[1:]:
            word = part[2:5]
            if word.isdigit():
                found.append(int(word))
        return [status for status in found if status != 100]


@dataclass(slots=True)
class Findings:
    """What was sent and what is wrong with what came."""

    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    # Of the given processes, every 200 requests.
    memory_mb: list[float] = field(default_factory=list)


def attack(port: int, send: Send, *, within_s: float = WITHIN_S, to_the_end: bool = True) -> Outcome:
    """One connection: whatever `send` writes, and all that comes until the other side closes or the time is over; or,
    unless `to_the_end`, until nothing follows a reply for a while.
    """
    started = time.monotonic()
    received = bytearray()
    closed = False
    with socket.create_connection(("127.0.0.1", port), timeout=within_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in send(started + within_s):
                connection.sendall(piece)
                closed = drained(connection, received)
                if closed:
                    break
            while not closed and time.monotonic() < started + within_s:
                left = max(0.05, started + within_s - time.monotonic())
                connection.settimeout(left if to_the_end or not received else min(left, QUIET_S))
                got = connection.recv(READ)
                received += got
                closed = not got
        except TimeoutError:
            closed = False
        except (BrokenPipeError, ConnectionResetError):
            # It was closed while we still wrote: what came before that may still lie there.
            closed = True
            drained(connection, received)
    return Outcome(bytes(received), time.monotonic() - started, closed)


def drained(connection: socket.socket, received: bytearray) -> bool:
    """Take what has come so far; whether the other side has closed."""
    before = connection.gettimeout()
    connection.settimeout(0.0)
    try:
        while True:
            got = connection.recv(READ)
            if not got:
                return True
            received += got
    except (BlockingIOError, InterruptedError):
        return False
    except ConnectionResetError:
        return True
    finally:
        connection.settimeout(before)


def judge(attacked: Attack, outcome: Outcome) -> list[str]:
    """What is wrong with a reply."""
    wrong = []
    if bad := [status for status in outcome.statuses if status >= 500]:
        wrong.append(f"{attacked.name}: status {bad[0]}: {outcome.reply[:300]!r}")
    if attacked.statuses and not outcome.statuses and not outcome.closed:
        wrong.append(f"{attacked.name}: neither a reply nor an end within {outcome.seconds:.0f} s")
    unexpected = set(outcome.statuses) - set(attacked.statuses)
    if attacked.statuses and unexpected:
        wrong.append(f"{attacked.name}: status {sorted(unexpected)}, expected {sorted(attacked.statuses)}")
    if attacked.closes and not outcome.closed:
        wrong.append(f"{attacked.name}: still open after {outcome.seconds:.0f} s")
    for forbidden in (*attacked.never, CANARY):
        if forbidden in outcome.reply:
            wrong.append(f"{attacked.name}: the reply holds {forbidden!r}")
    return wrong


def ask(port: int, key: str | None = None) -> tuple[int, bytes]:
    """An ordinary request: status and body, without what differs from one to the next."""
    outcome = attack(port, plain(key), within_s=30)
    head, _, body = outcome.reply.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.") else 0
    try:
        parsed = json.loads(body)
    except ValueError:
        return status, body
    return status, json.dumps(parsed.get("data"), sort_keys=True).encode()


def mutations(attacks: Sequence[Attack], chance: random.Random) -> Iterator[Attack]:
    """Without end: attacks of one piece, with bytes changed, doubled, cut out or spliced from another."""
    whole = [(each, b"".join(each.send(time.monotonic()))) for each in attacks if each.mutable]
    while True:
        chosen, data = chance.choice(whole)
        raw = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            MUTATIONS[chance.randrange(len(MUTATIONS))](raw, chance, whole)
        frozen = bytes(raw)
        yield Attack(f"mutation of {chosen.name}", lambda _, frozen=frozen: iter([frozen]), statuses=frozenset())


def _flip(raw: bytearray, chance: random.Random, _: object) -> None:
    if raw:
        raw[chance.randrange(len(raw))] = chance.randrange(256)


def _cut(raw: bytearray, chance: random.Random, _: object) -> None:
    start = chance.randrange(len(raw) + 1)
    del raw[start : start + chance.randint(1, 32)]


def _double(raw: bytearray, chance: random.Random, _: object) -> None:
    start = chance.randrange(len(raw) + 1)
    piece = raw[start : start + chance.randint(1, 64)]
    raw[start:start] = piece * chance.randint(1, 20)


def _splice(raw: bytearray, chance: random.Random, whole: list[tuple[Attack, bytes]]) -> None:
    other = chance.choice(whole)[1]
    start = chance.randrange(len(other) + 1)
    place = chance.randrange(len(raw) + 1)
    raw[place:place] = other[start : start + chance.randint(1, 200)]


def _insert(raw: bytearray, chance: random.Random, _: object) -> None:
    place = chance.randrange(len(raw) + 1)
    raw[place:place] = chance.choice(PIECES)


PIECES = (b"\r\n", b"\n", b"\x00", b"\xff\xfe", b"%00", b"../", b"{", b"[" * 300, b'"', b"1e999", b"NaN", b": ", b" ")
Mutation = Callable[[bytearray, random.Random, list[tuple[Attack, bytes]]], None]
MUTATIONS: tuple[Mutation, ...] = (_flip, _cut, _double, _splice, _insert)


def memory_mb(pids: Sequence[int]) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids) / 1e6


def strike(options: argparse.Namespace, findings: Findings) -> None:
    """Mutations for so long, and an ordinary request between them now and then."""
    attacks, before = corpus(options.key), ask(options.port, options.key)
    until, chance = time.monotonic() + 60 * options.minutes, random.Random(options.seed)
    for number, each in enumerate(mutations(attacks, chance)):
        if time.monotonic() > until:
            break
        outcome = attack(options.port, each.send, within_s=2.0)
        findings.sent += 1
        findings.statuses.update(map(str, outcome.statuses or ["none"]))
        findings.wrong += judge(each, outcome)
        if number % 200 == 199:
            findings.memory_mb.append(round(memory_mb(options.pid), 1))
            if ask(options.port, options.key) != before:
                findings.wrong.append(f"an ordinary request was answered otherwise after {findings.sent} requests")
    if ask(options.port, options.key) != before:
        findings.wrong.append("an ordinary request is answered otherwise than before")


def struck_beside(readers: SlowReaders, options: argparse.Namespace, findings: Findings) -> dict[str, object]:
    """The same, and what clients cost that read hardly at all meanwhile."""
    with readers:
        strike(options, findings)
        free, held = until_free(options.port, FREE_WITHIN_S, options.key), readers.held()
    findings.wrong += readers.wrong
    if not readers.most_slots:
        findings.wrong.append("the slow readers had no slot at any time")
    if free is None:
        findings.wrong.append(f"slots were taken {FREE_WITHIN_S:g} s after the end, while slow readers read")
    if held:
        findings.wrong.append(f"{held} connections to slow readers are kept")
    return {
        "slow_readers": dict(readers.statuses),
        "bytes_each": max(map(len, readers.read)),
        "most_slots": readers.most_slots,
        "free_after_s": free,
        "held": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--key")
    parser.add_argument("--pid", type=int, action="append", default=[])
    parser.add_argument("--growth-mb", type=float, default=200.0)
    parser.add_argument("--slow-readers", type=int, default=0)
    parser.add_argument("--text", help="the model of their streams")
    options = parser.parse_args()

    findings, memory, slow = Findings(), memory_mb(options.pid), {}
    if options.slow_readers:
        readers = SlowReaders(options.port, options.slow_readers, options.text, options.key)
        slow = struck_beside(readers, options, findings)
    else:
        strike(options, findings)
    grown = memory_mb(options.pid) - memory
    if grown > options.growth_mb:
        findings.wrong.append(f"{grown:.0f} MB of growth")
    figures = {
        "sent": findings.sent,
        "seed": options.seed,
        "statuses": dict(sorted(findings.statuses.items())),
        "grown_mb": round(grown, 1),
        "memory_mb": findings.memory_mb,
        **slow,
        "wrong": findings.wrong,
    }
    print(json.dumps(figures))
    sys.exit(bool(findings.wrong))


if __name__ == "__main__":
    main()
