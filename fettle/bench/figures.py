"""What a load amounts to: rates, latencies, what of it kept its objectives, by class and by operating point.

Pure functions of samples. Latency counts from the time a request was due; time to first token does so too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fettle.bench.crew import Measured, clients_report
from fettle.bench.samples import Mask, Samples, Seconds, quantiles, summarize
from fettle.errors import UsageError

POINT, VARIANT = "x-fettle-point", "x-fettle-variant"
KEPT = (POINT, VARIANT)
NAMES = {"latency": "latency_ms", "e2e": "latency_ms", "ttft": "ttft_ms", "tpot": "tpot_ms"}
# Of one core: from here on a client has no time left to be on time.
BUSY = 0.85
# The client's own delay, as a part of the median latency that it reports, from which on figures are not the server's.
LATE = 0.1
LEAST_LATE_MS = 2.0


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a good answer keeps, in milliseconds; None: no matter."""

    latency_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @classmethod
    def of(cls, text: str | None) -> Objectives | None:
        """From `ttft=500,tpot=50`, or `latency=100`.

        Raises:
            UsageError: another name, or no positive number.
        """
        if text is None:
            return None
        found = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            try:
                ms = float(value)
            except ValueError:
                ms = 0.0
            if name.strip() not in NAMES or not ms > 0:
                raise UsageError(f"--goodput: {part!r} must be latency=MS, ttft=MS or tpot=MS, with commas between")
            found[NAMES[name.strip()]] = ms
        return cls(**found)

    def kept(self, samples: Samples) -> Mask:
        """Which good replies keep all of them."""
        fine = samples.good
        if self.latency_ms is not None:
            fine = fine & (samples.ms <= self.latency_ms)
        if self.ttft_ms is not None:
            fine = fine & (ttft_ms(samples) <= self.ttft_ms)
        if self.tpot_ms is not None:
            # A text of one token has no time between two.
            fine = fine & ((samples.tokens < 2) | (tpot_ms(samples) <= self.tpot_ms))
        return np.asarray(fine)


def figures(measured: Measured, objectives: Objectives | None = None) -> dict[str, Any]:
    """The whole report as plain values."""
    inside, window = measured.inside, measured.window_s
    found = part(inside, window, objectives) | {"client": clients_report(measured.clients)}
    if "ttft_ms" in found:
        found["tokens_per_s"] = round(tokens_within(measured.samples, window) / window, 1)
    if len(measured.plan.flows) > 1:
        found["classes"] = {
            flow.tag: part(inside.where(inside.of(flow.tag)), window, objectives) for flow in measured.plan.flows
        }
    found["points"] = by_point(inside, window, objectives)
    found["seconds"] = by_second(inside, window)
    found["interrupted"] = measured.interrupted
    found["warnings"] = warnings(found)
    return found


def part(samples: Samples, window: float, objectives: Objectives | None) -> dict[str, Any]:
    """Counts, rate and latencies of some of the requests."""
    found = summarize(samples, window)
    good = samples.where(samples.good)
    if good.streamed:
        found |= {
            "ttft_ms": quantiles(_numbers(ttft_ms(good))),
            "tpot_ms": quantiles(tpot_ms(good.where(good.tokens > 1))),
            "inter_token_ms": quantiles(1000 * good.gaps),
            "tokens": int(good.tokens.sum()),
            "tokens_a_piece": round(float(good.tokens.sum() / max(1, good.pieces.sum())), 2),
        }
    if objectives is not None:
        kept = int(objectives.kept(samples).sum())
        found |= {
            "goodput_rps": round(kept / window, 2) if window > 0 else 0.0,
            "kept": round(kept / max(1, len(samples)), 4),
        }
    return found


def ttft_ms(samples: Samples) -> Seconds:
    """To the first text, from when the request was due; NaN where none came."""
    return (samples.first - samples.due) * 1000


def tpot_ms(samples: Samples) -> Seconds:
    """Mean time of a token after the first one."""
    return (samples.last - samples.first) * 1000 / np.maximum(samples.tokens - 1, 1)


def tokens_within(samples: Samples, window: float) -> float:
    """Of every text the part that came while the window was open, as if its tokens came evenly."""
    good = samples.where(samples.good & (samples.pieces > 0))
    length = np.maximum(good.last - good.first, 1e-9)
    share = np.clip(np.minimum(good.last, window) - np.maximum(good.first, 0.0), 0.0, None) / length
    at_once = good.last - good.first <= 1e-9
    share[at_once] = (good.first[at_once] >= 0) & (good.first[at_once] < window)
    return float((good.tokens * np.clip(share, 0.0, 1.0)).sum())


def by_point(samples: Samples, window: float, objectives: Objectives | None) -> dict[str, Any]:
    """By the operating point that answered, or the variant where there was none, as Fettle's replies say."""
    if POINT not in samples.headers:
        return {}
    names = np.where(samples.headers[POINT] != "", samples.headers[POINT], samples.headers[VARIANT])
    return {
        str(name): part(samples.where(np.asarray(names == name)), window, objectives)
        for name in sorted(set(names.tolist()))
        if name
    }


def by_second(samples: Samples, window: float) -> list[dict[str, Any]]:
    """What was due, or ended, in each second: good ones, others, and latencies."""
    at = np.floor(samples.ended).astype(int)
    found = []
    for second in range(max(1, round(window))):
        here = samples.where(at == second)
        ranks = quantiles(here.ms[here.good])
        good = int(here.good.sum())
        found.append({"good": good, "other": len(here) - good, "p50_ms": ranks["p50_ms"], "p99_ms": ranks["p99_ms"]})
    return found


def warnings(found: dict[str, Any]) -> list[str]:
    """Why figures may not be the server's own, and what to do about it."""
    client, said = found["client"], []
    if client["busiest_client"] >= BUSY:
        said.append(
            f"the client is the bottleneck: one of its processes used {client['busiest_client']:.0%} of a core; "
            "use more --processes, or another machine for it"
        )
    late = max(client["send_lag_p99_ms"] or 0.0, client["loop_lag_p99_ms"])
    if late > max(LEAST_LATE_MS, LATE * (found["p50_ms"] or 0.0)):
        said.append(
            f"the client itself was late by up to {late:.1f} ms (p99), which is in the latencies: its cores are busy; "
            "use another machine for it, or more --processes"
        )
    if client["out_of_connections"]:
        said.append(
            f"{client['out_of_connections']} requests waited for one of the client's connections, which counts; "
            "more --processes have more of them"
        )
    if client["connections_failed"]:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in client["connections_failed"].items())
        said.append(f"connections could not be opened, and were tried again: {kinds}")
    if client["checked"]["problems"]:
        said.append(f"replies with status 200 are not what they should be: {client['checked']['problems'][0]}")
    if client["refusal"]:
        said.append(f"the first error that came back: {client['refusal']}")
    return said


def _numbers(values: Seconds) -> Seconds:
    return values[~np.isnan(values)]
