"""Every metric of Fettle: name, kind, help, unit and labels, in this one file; `docs/metrics.md` is made of it.

`python -m deployments.metrics` prints the table of that page. Ray puts `ray_` before a name, and `_total` behind that
of a counter. A histogram is three counters, `NAME_bucket_total` with a label `le`, `NAME_count_total` and
`NAME_sum_total`: Ray's own histograms are rebuilt from the middles of their buckets on every node, so that their sums
are wrong, and cost a call for each observation, where these are totals that were counted anyway. `histogram_quantile`
reads them as any.

Labels are names from configuration and family files, and words from this code; never anything that a client sent.
Knows neither Ray nor who counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` as it is given to Ray; `told` by each router, by each replica of a text variant, by the monitor, or by
    Serve's controller.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    told: str = "router"

    @property
    def series(self) -> tuple[str, ...]:
        """The names that Prometheus shows."""
        if self.kind is Kind.GAUGE:
            return (f"ray_{self.name}",)
        if self.kind is Kind.COUNTER:
            return (f"ray_{self.name}_total",)
        return tuple(f"ray_{part.name}_total" for part in self.parts)

    @property
    def parts(self) -> tuple[Metric, ...]:
        """The counters of a histogram: bucket, count and sum."""
        bucket = Metric(
            f"{self.name}_bucket", Kind.COUNTER, f"{self.help}: up to `le`", (*self.labels, "le"), self.told
        )
        count = Metric(f"{self.name}_count", Kind.COUNTER, f"{self.help}: how many", self.labels, self.told)
        total = Metric(f"{self.name}_sum", Kind.COUNTER, f"{self.help}: sum", self.labels, self.told)
        return bucket, count, total


def _counter(name: str, help: str, *labels: str, told: str = "router") -> Metric:
    return Metric(f"fettle_{name}", Kind.COUNTER, help, labels, told)


def _gauge(name: str, help: str, *labels: str, told: str = "router") -> Metric:
    return Metric(f"fettle_{name}", Kind.GAUGE, help, labels, told)


def _histogram(name: str, help: str, *labels: str, told: str = "router") -> Metric:
    return Metric(f"fettle_{name}", Kind.HISTOGRAM, help, labels, told)


# Requests

REQUESTS = _counter("requests", "Requests that were answered", "family", "class", "point")
REFUSALS = _counter("refusals", "Requests that were refused, too late or failed in the router", "family", "reason")
ERRORS = _counter("errors", "Replies with an error, by the code in their body", "status", "code")
ROWS = _counter("rows", "Texts that were answered, by the variant and the exit that did", "family", "variant", "exit")
TEXTS = _counter("texts", "Generated texts, by the reason why they ended", "family", "variant", "finish")
ATTEMPTS = _counter("attempts_given_up", "Generated texts that a dearer variant replaced", "family", "variant")

# Where the time goes

REQUEST_SECONDS = _histogram("request_seconds", "From arrival to reply, seconds", "family", "class")
TOKENIZE_SECONDS = _histogram("tokenize_seconds", "Tokenization of a request, seconds", "family")
QUEUE_SECONDS = _histogram("queue_seconds", "The longest wait of a request's rows in queues, seconds", "family")
INFERENCE_SECONDS = _histogram("inference_seconds", "Inference of a request in all its steps, seconds", "family")
FIRST_TOKEN_SECONDS = _histogram(
    "time_to_first_token_seconds", "Of streams: from arrival to the first token, seconds", "family", "variant"
)
TOKEN_SECONDS = _histogram(
    "time_per_output_token_seconds", "Of streams: mean time between two tokens, seconds", "family", "variant"
)
OBJECTIVE = _gauge("objective_seconds", "The latency objective of the configuration, seconds", "family", "task")

# Tokens

INPUT_TOKENS = _counter("input_tokens", "Tokens of requests that were answered", "family")
CACHED_TOKENS = _counter("cached_tokens", "Tokens of prompts that were known from an earlier one", "family")
OUTPUT_TOKENS = _counter("output_tokens", "Generated tokens, those of attempts that were given up included", "family")

# Load

BACKLOG = _gauge("backlog_seconds", "Predicted time until all waiting work is done", "family", "variant")
QUEUED = _gauge("queued_rows", "Rows or calls that wait", "family", "variant")
PRESSURE = _gauge("pressure", "Predicted drain time over the objective, smoothed", "family", "class")
GEAR = _gauge("gear", "The operating point in use, counted from the most faithful one of the class", "family", "class")
GEARS = _gauge("gears", "How many operating points the class may use", "family", "class")
BATCHES = _counter("batches", "Batches, or calls for text, that were answered", "family", "variant")
BATCH_ROWS = _histogram("batch_rows", "Rows of a batch", "family", "variant")
ROW_TOKENS = _counter("row_tokens", "Tokens in batches, padding left out", "family", "variant")
PADDED_TOKENS = _counter("padded_tokens", "Tokens in batches, padding included", "family", "variant")
BUSY_SECONDS = _counter("busy_seconds", "Time that engines worked, of all replicas together", "family", "variant")
RETRIES = _counter("retries", "Rows or calls that went to another replica", "family", "variant")
WITHDRAWN = _counter("withdrawn", "Rows or calls whose client left before their turn", "family", "variant")
LATE = _counter("late", "Rows or calls that were given up for their deadline", "family", "variant")

# Replicas and routers

READY = _gauge("ready", "1 where whatever answers by default has a replica that takes work", "family")
REPLICAS = _gauge("replicas", "Replicas that run", "family", "variant")
WANTED = _gauge("replicas_wanted", "Replicas that Serve aims at", "family", "variant")
MOST = _gauge("replicas_most", "Replicas that the configuration allows", "family", "variant")
STARTED = _counter("replica_starts", "Replicas that were started since the router was", "family", "variant")
ROUTER_CPU = _counter("router_cpu_seconds", "Processor time of a router's process")
ROUTER_LAG = _gauge("router_lag_seconds", "How late a router's event loop was, at most in the last second")
MONITOR_AGE = _gauge("monitor_age_seconds", "Since a router last heard from the monitor")
INFO = _gauge("info", "1, with the version as a label", "version")

DECISIONS = _counter(
    "autoscaler_decisions",
    "Changes of a number of replicas, by direction (up, down) and cause",
    "deployment",
    "direction",
    "cause",
    told="controller",
)

# The promise

COMPARED = _gauge(
    "compared_answers", "Answers compared with the reference's since the certificate", "family", "point", told="monitor"
)
CHANGED = _gauge("changed_answers", "Those of them that differed", "family", "point", told="monitor")
EVIDENCE = _gauge(
    "evidence",
    "Evidence against a point: log10; the alarm is at fettle_alarm_evidence",
    "family",
    "point",
    told="monitor",
)
ALARM = _gauge("alarm_evidence", "log10 of the evidence at which a point is revoked", "family", "point", told="monitor")
BOUND = _gauge("certified_share", "The certified bound on changed answers", "family", "point", told="monitor")
LEVEL = _gauge(
    "promised_share", "The share of changed answers that the point promises", "family", "point", told="monitor"
)
REVOKED = _gauge("point_revoked", "1 once an alarm has revoked the point", "family", "point", told="monitor")
DRIFTING = _gauge(
    "point_drifting", "1 where exits or scores are not as they were when it was certified", "family", "point",
    told="monitor",
)  # fmt: skip

# Text generation, in the replica

SLOTS = _gauge("generator_slots", "Generations that decode together, at most", "family", "variant", told="replica")
ALIVE = _gauge("generator_alive", "Generations that have a slot", "family", "variant", told="replica")
WAITING = _gauge("generator_waiting", "Generations that wait for a slot", "family", "variant", told="replica")
CACHE_TOKENS = _gauge("cache_tokens", "Tokens in the cache of keys and values", "family", "variant", told="replica")
CACHE_SIZE = _gauge("cache_capacity_tokens", "Tokens that the cache can hold", "family", "variant", told="replica")
FED_TOKENS = _counter("fed_tokens", "Tokens of prompts that were fed", "family", "variant", told="replica")
REUSED_TOKENS = _counter(
    "reused_tokens", "Tokens of prompts that were in the cache", "family", "variant", told="replica"
)
FEED_SECONDS = _counter("feed_seconds", "Time spent on feeding prompts", "family", "variant", told="replica")
DECODE_STEPS = _counter("decode_steps", "Steps of decoding", "family", "variant", told="replica")
DECODED_TOKENS = _counter("decoded_tokens", "Tokens of these steps", "family", "variant", told="replica")
DECODE_SECONDS = _counter("decode_seconds", "Time spent on decoding", "family", "variant", told="replica")
PREEMPTIONS = _counter("preemptions", "Generations that had to give up their slot", "family", "variant", told="replica")
DRAFTED = _counter("drafted_tokens", "Tokens that were guessed ahead", "family", "variant", told="replica")
ACCEPTED = _counter("accepted_tokens", "Guessed tokens that were right", "family", "variant", told="replica")

METRICS: tuple[Metric, ...] = tuple(found for found in list(globals().values()) if isinstance(found, Metric))


def reference_table() -> str:
    """The table of `docs/metrics.md`."""
    rows = ["| in Prometheus | kind | labels | from | what it is |", "| --- | --- | --- | --- | --- |"]
    for metric in METRICS:
        name = metric.series[0].replace("_bucket_total", "_{bucket,count,sum}_total")
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        rows.append(f"| `{name}` | {metric.kind} | {labels} | {metric.told} | {metric.help} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(reference_table())
