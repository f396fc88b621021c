"""What a load client saw, request by request, as columns: kept in a file, cut by time and by flow, counted.

Knows nothing of servers; `fettle.bench.pool` records it, `fettle.bench.figures` sums it up for people.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fettle.bench.http1 import Reply
from fettle.bench.sse import Stream
from fettle.bench.traffic import Request, first_label

LOST = 0  # the status of a request whose connection broke, or that was never answered
RANKS = {"p50_ms": 0.5, "p90_ms": 0.9, "p95_ms": 0.95, "p99_ms": 0.99, "p99.9_ms": 0.999, "max_ms": 1.0}

Seconds = NDArray[np.float64]
Numbers = NDArray[np.int32]
Words = NDArray[np.object_]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Samples:
    """Finished requests in the order in which they ended, one column each.

    `due`, `sent` and `ended` in seconds since a moment that was `epoch` on the clock of the world; `flow` and `text`
    are numbers; `problem` says what was wrong beside the status; `answer` is the label, empty where none was read;
    `headers` has those that were asked for, empty where a reply had none. Of streams, `first` and `last` are when text
    came (NaN where none did), `tokens` how many, `pieces` in how many events, and `gaps` the seconds between these, one
    after the other for all requests.
    """

    tags: list[str]
    epoch: float
    due: Seconds
    sent: Seconds
    ended: Seconds
    first: Seconds
    last: Seconds
    status: Numbers
    flow: Numbers
    text: Numbers
    tokens: Numbers
    pieces: Numbers
    retry_after: Mask
    problem: Words
    answer: Words
    gaps: Seconds
    headers: dict[str, Words]

    def __len__(self) -> int:
        return len(self.due)

    @property
    def good(self) -> Mask:
        return np.asarray((self.status == 200) & (self.problem == ""))

    @property
    def ms(self) -> Seconds:
        return (self.ended - self.due) * 1000

    @property
    def streamed(self) -> bool:
        return bool((self.pieces > 0).any())

    def of(self, tag: str) -> Mask:
        return np.asarray(self.flow == self.tags.index(tag))

    def where(self, chosen: Mask) -> Samples:
        kept = {name: getattr(self, name)[chosen] for name in (*PLAIN, *WORDY)}
        gaps = self.gaps[np.repeat(chosen, np.maximum(self.pieces - 1, 0))]
        return replace(self, **kept, gaps=gaps, headers={name: column[chosen] for name, column in self.headers.items()})

    def save(self, path: Path) -> None:
        """One compressed file; words as numbers into a list of the different ones."""
        words = {name: getattr(self, name) for name in WORDY}
        words |= {f"header {name}": column for name, column in self.headers.items()}
        coded: dict[str, NDArray[Any]] = {}
        for name, column in words.items():
            different, codes = np.unique(column.astype(str), return_inverse=True)
            coded |= {f"{name} words": different, f"{name} codes": codes.astype(np.int32)}
        columns = {name: getattr(self, name) for name in (*PLAIN, "gaps")}
        head = json.dumps({"tags": self.tags, "epoch": self.epoch, "headers": list(self.headers)})
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, head=np.array(head), **columns, **coded)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Samples:
        with np.load(path) as file:
            head = json.loads(str(file["head"]))

            def words(name: str) -> Words:
                found: Words = file[f"{name} words"].astype(object)[file[f"{name} codes"]]
                return found

            columns: dict[str, Any] = {name: file[name] for name in (*PLAIN, "gaps")}
            columns |= {name: words(name) for name in WORDY}
            headers = {name: words(f"header {name}") for name in head["headers"]}
            return cls(head["tags"], head["epoch"], **columns, headers=headers)

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Those of several clients of one load, on one clock."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*PLAIN, *WORDY, "gaps")}
        headers = {name: np.concatenate([part.headers[name] for part in parts]) for name in parts[0].headers}
        whole = cls(parts[0].tags, parts[0].epoch, **columns, headers=headers)
        return whole._reordered(np.argsort(whole.ended, kind="stable"))

    def _reordered(self, order: NDArray[np.intp]) -> Samples:
        counts = np.maximum(self.pieces - 1, 0)
        starts = np.cumsum(counts) - counts
        spans = [np.arange(starts[row], starts[row] + counts[row]) for row in order if counts[row]]
        gaps = self.gaps[np.concatenate(spans)] if spans else self.gaps
        kept = {name: getattr(self, name)[order] for name in (*PLAIN, *WORDY)}
        return replace(self, **kept, gaps=gaps, headers={name: column[order] for name, column in self.headers.items()})


WORDY = ("problem", "answer")
PLAIN = tuple(f.name for f in fields(Samples) if f.name not in ("tags", "epoch", "gaps", "headers", *WORDY))


class Recorder:
    """Takes each finished request down; `keep_bodies` good replies are kept whole, for a check of their shape."""

    def __init__(self, keep_bodies: int, headers: Sequence[str] = (), *, labels: bool = False) -> None:
        self.bodies: list[bytes] = []
        self.refusal = ""
        self._rows: list[tuple[Any, ...]] = []
        self._gaps: list[NDArray[np.float64]] = []
        self._names = [name.lower() for name in headers]
        self._keys = [name.encode() for name in self._names]
        self._keep, self._labels = keep_bodies, labels
        self._told = 0

    def __call__(
        self,
        due: float,
        sent: float,
        ended: float,
        request: Request,
        reply: Reply | None,
        stream: Stream | None = None,
        problem: str = "connection broke",
    ) -> None:
        """Times on the clock of `perf_counter`; without a reply the request was lost, and `problem` says how."""
        came = [] if stream is None else stream.came
        times = (came[0], came[-1]) if came else (math.nan, math.nan)
        if came:
            # Its pieces are noted one by one, a little after all that came with them was found.
            ended = max(ended, came[-1])
        length = 0 if stream is None else stream.length
        status = LOST if reply is None else reply.status
        if reply is not None:
            problem = "" if stream is None or status != 200 else stream.problem
        good = status == 200 and not problem
        headers = {} if reply is None else reply.headers
        body = b"" if reply is None else reply.body
        if len(came) > 1:
            self._gaps.append(np.diff(came))
        self._rows.append(
            (
                due,
                sent,
                ended,
                *times,
                status,
                request.flow,
                request.text,
                length,
                len(came),
                b"retry-after" in headers,
                problem,
                first_label(body) if good and self._labels else "",
                tuple([headers.get(key, b"") for key in self._keys]),
            )
        )
        if good and len(self.bodies) < self._keep:
            self.bodies.append(body)
        if status >= 400 and status != 429 and not self.refusal:
            self.refusal = f"{status}: {body[:300].decode(errors='replace')}"

    def __len__(self) -> int:
        return len(self._rows)

    def news(self) -> tuple[int, int, list[float]]:
        """Since the last call: good replies, others, and the ms of the good ones."""
        rows, self._told = self._rows[self._told :], len(self._rows)
        good = [1000 * (row[2] - row[0]) for row in rows if row[5] == 200 and not row[11]]
        return len(good), len(rows) - len(good), good

    def samples(self, tags: Sequence[str], start: float, epoch: float) -> Samples:
        """All so far, with times counted from `start`, which was `epoch` on the clock of the world."""
        columns = list(zip(*self._rows, strict=True)) or [()] * 14
        *plain, problem, answer, kept = columns
        headers = list(zip(*kept, strict=True)) or [()] * len(self._names)
        made: dict[str, Any] = {}
        for name, column in zip(PLAIN, plain, strict=True):
            if name in TIMES:
                made[name] = np.array(column, np.float64) - start
            else:
                made[name] = np.array(column, bool if name == "retry_after" else np.int32)
        return Samples(
            tags=list(tags),
            epoch=epoch,
            **made,
            problem=_words(problem),
            answer=_words(answer),
            gaps=np.concatenate(self._gaps) if self._gaps else np.empty(0),
            headers={name: _words(column) for name, column in zip(self._names, headers, strict=True)},
        )


TIMES = ("due", "sent", "ended", "first", "last")


def summarize(samples: Samples, window_s: float) -> dict[str, Any]:
    """Counts by status, good replies a second, latency of the good and of the refused (429) ones in ms."""
    refused = samples.status == 429
    report: dict[str, Any] = {
        "requests": len(samples),
        "statuses": dict(sorted(Counter(map(status_name, samples.status.tolist())).items())),
        "window_s": round(window_s, 3),
        "rps": round(int(samples.good.sum()) / window_s, 2) if window_s > 0 else 0.0,
        "mean_ms": round(float(samples.ms[samples.good].mean()), 3) if samples.good.any() else None,
        **quantiles(samples.ms[samples.good]),
    }
    problems = Counter(word for word in samples.problem.tolist() if word)
    if problems:
        report["problems"] = dict(sorted(problems.items()))
    if refused.any():
        latencies = quantiles(samples.ms[refused])
        report["refused"] = {"with_retry_after": int(samples.retry_after[refused].sum()), **latencies}
    return report


def status_name(status: int) -> str:
    return "lost" if status == LOST else str(status)


def quantiles(ms: Seconds) -> dict[str, float | None]:
    """Nearest-rank quantiles; None where there is nothing to rank."""
    if not len(ms):
        return dict.fromkeys(RANKS)
    ranked = np.sort(ms)
    return {name: round(float(ranked[max(0, math.ceil(q * len(ranked)) - 1)]), 3) for name, q in RANKS.items()}


def _words(column: Sequence[Any]) -> Words:
    """Header values come as bytes."""
    made = np.empty(len(column), object)
    made[:] = [word.decode("latin-1") if isinstance(word, bytes) else word for word in column]
    return made
