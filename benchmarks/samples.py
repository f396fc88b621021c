"""What a load client saw, request by request, as columns: kept in a file, cut by time and by flow, summed up.

Knows nothing of servers; `benchmarks.pool` records it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.http1 import Reply
from benchmarks.traffic import Request, first_label

LOST = 0  # the status of a request whose connection broke, or that was never answered
RANKS = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "max_ms": 1.0}

Seconds = NDArray[np.float64]
Numbers = NDArray[np.int32]
Words = NDArray[np.object_]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Samples:
    """Finished requests in the order in which they ended, one column each.

    `due` and `ended` in seconds since a moment that was `epoch` on the clock of the world; `flow` and `text` are
    numbers; `answer` is the label, empty where none was read; `headers` has those that were asked for, empty where a
    reply had none.
    """

    tags: list[str]
    epoch: float
    due: Seconds
    ended: Seconds
    status: Numbers
    flow: Numbers
    text: Numbers
    retry_after: Mask
    answer: Words
    headers: dict[str, Words]

    def __len__(self) -> int:
        return len(self.due)

    @property
    def good(self) -> Mask:
        return np.asarray(self.status == 200)

    @property
    def ms(self) -> Seconds:
        return (self.ended - self.due) * 1000

    def of(self, tag: str) -> Mask:
        return np.asarray(self.flow == self.tags.index(tag))

    def where(self, chosen: Mask) -> Samples:
        return Samples(
            self.tags,
            self.epoch,
            self.due[chosen],
            self.ended[chosen],
            self.status[chosen],
            self.flow[chosen],
            self.text[chosen],
            self.retry_after[chosen],
            self.answer[chosen],
            {name: column[chosen] for name, column in self.headers.items()},
        )

    def save(self, path: Path) -> None:
        """One compressed file; words as numbers into a list of the different ones."""
        words = {"answer": self.answer, **{f"header {name}": column for name, column in self.headers.items()}}
        coded: dict[str, NDArray[Any]] = {}
        for name, column in words.items():
            different, codes = np.unique(column.astype(str), return_inverse=True)
            coded |= {f"{name} words": different, f"{name} codes": codes.astype(np.int32)}
        columns = {name: getattr(self, name) for name in ("due", "ended", "status", "flow", "text", "retry_after")}
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

            return cls(
                tags=head["tags"],
                epoch=head["epoch"],
                **{name: file[name] for name in ("due", "ended", "status", "flow", "text", "retry_after")},
                answer=words("answer"),
                headers={name: words(f"header {name}") for name in head["headers"]},
            )


class Recorder:
    """Takes each finished request down; `keep_bodies` good replies are kept whole, for a check of their shape."""

    def __init__(self, keep_bodies: int, headers: Sequence[str] = (), *, labels: bool = False) -> None:
        self.bodies: list[bytes] = []
        self._rows: list[tuple[Any, ...]] = []
        self._names = [name.lower() for name in headers]
        self._keys = [name.encode() for name in self._names]
        self._keep, self._labels = keep_bodies, labels

    def __call__(self, due: float, ended: float, request: Request, reply: Reply | None) -> None:
        """`due` and `ended` on the clock of `perf_counter`; without a reply the request was lost."""
        if reply is None:
            self._rows.append((due, ended, LOST, request.flow, request.text, False, b"", (b"",) * len(self._keys)))
            return
        headers, good = reply.headers, reply.status == 200
        self._rows.append(
            (
                due,
                ended,
                reply.status,
                request.flow,
                request.text,
                b"retry-after" in headers,
                first_label(reply.body) if good and self._labels else "",
                tuple([headers.get(key, b"") for key in self._keys]),
            )
        )
        if good and len(self.bodies) < self._keep:
            self.bodies.append(reply.body)

    def samples(self, tags: Sequence[str], start: float, epoch: float) -> Samples:
        """All so far, with times counted from `start`, which was `epoch` on the clock of the world."""
        columns = list(zip(*self._rows, strict=True)) or [()] * 8
        due, ended, status, flow, text, retry_after, answer, kept = columns
        headers = list(zip(*kept, strict=True)) or [()] * len(self._names)
        return Samples(
            tags=list(tags),
            epoch=epoch,
            due=np.array(due, np.float64) - start,
            ended=np.array(ended, np.float64) - start,
            status=np.array(status, np.int32),
            flow=np.array(flow, np.int32),
            text=np.array(text, np.int32),
            retry_after=np.array(retry_after, bool),
            answer=_words(answer),
            headers={name: _words(column) for name, column in zip(self._names, headers, strict=True)},
        )


def summarize(samples: Samples, window_s: float) -> dict[str, Any]:
    """Counts by status, good replies a second, latency of the good and of the refused (429) ones in ms."""
    refused = samples.status == 429
    statuses = Counter("lost" if status == LOST else str(status) for status in samples.status.tolist())
    report: dict[str, Any] = {
        "requests": len(samples),
        "statuses": dict(sorted(statuses.items())),
        "window_s": round(window_s, 3),
        "rps": round(int(samples.good.sum()) / window_s, 2),
        **quantiles(samples.ms[samples.good]),
    }
    if refused.any():
        latencies = quantiles(samples.ms[refused])
        report["refused"] = {"with_retry_after": int(samples.retry_after[refused].sum()), **latencies}
    return report


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
