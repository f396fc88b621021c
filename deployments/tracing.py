"""Traces by OpenTelemetry, of a share of the requests, where an endpoint is configured; nothing at all where none is.

A request is a span, continued from the client's `traceparent`; below it tokenization, and each step of its way with its
queue, its inference, and the replica's own span, which the replica sends. Sampling is decided once, at the border: what
is not sampled has no `Trace`, and costs nothing further. Spans say names, sizes and times, never texts or keys.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fettle.config import TracingConfig
from fettle.errors import UsageError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

NAME = "fettle"
NS_PER_MS = 1e6

Facts = Mapping[str, str | int | float | bool]


class Tracer:
    """Makes the spans of one process and hands those that are over to `processor`."""

    def __init__(self, processor: SpanProcessor, share: float = 1.0) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Of this object alone: Ray has a provider of its own, and the process's is not ours to set.
        self.provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(share), resource=Resource.create({"service.name": NAME})
        )
        self.provider.add_span_processor(processor)
        self._tracer = self.provider.get_tracer(NAME)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, parent: str | None) -> Trace | None:
        """A request's trace, below the client's own span if there is one; None if it is not sampled."""
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(name, self._context(parent), SpanKind.SERVER)
        return Trace(self, span) if span.is_recording() else None

    def below(self, parent: str, name: str, began: int, facts: Facts) -> None:
        """A span that is over now, below one of another process."""
        self._tracer.start_span(name, self._context(parent), attributes=facts, start_time=began).end()

    def child(self, parent: Span, name: str, start: int | None = None, facts: Facts | None = None) -> Span:
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(name, set_span_in_context(parent), attributes=facts, start_time=start)

    def header(self, span: Span) -> str:
        """The span's `traceparent`."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier["traceparent"]

    def _context(self, parent: str | None) -> Context:
        from opentelemetry.context import Context

        # A header that is none is as good as no header.
        return self._propagator.extract({"traceparent": parent} if parent else {}, Context())


@dataclass(slots=True, eq=False)
class Trace:
    """One sampled request."""

    tracer: Tracer
    span: Span

    def tokenized(self, ms: float) -> None:
        """Just now."""
        now = time.time_ns()
        self.tracer.child(self.span, "tokenize", now - int(ms * NS_PER_MS)).end(now)

    def step(self, variant: str) -> StepTrace:
        return StepTrace(self.tracer, self.tracer.child(self.span, "step", facts={"variant": variant}))

    def say(self, facts: Facts) -> None:
        self.span.set_attributes(dict(facts))

    def end(self, status: int) -> None:
        from opentelemetry.trace import StatusCode

        self.span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self.span.set_status(StatusCode.ERROR)
        self.span.end()


@dataclass(slots=True, eq=False)
class StepTrace:
    """One step of its way, or one attempt at a text, as long as the block runs that it is entered for.

    `parent` is what its replica hangs its own span on. A step that nothing is told of broke off in its queue.
    """

    tracer: Tracer
    span: Span
    began: int = field(default_factory=time.time_ns)
    _turn: int | None = None
    _facts: Facts = field(default_factory=dict)

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *_: object) -> None:
        now = time.time_ns()
        turn = now if self._turn is None else min(now, self._turn)
        self.tracer.child(self.span, "queue", self.began).end(turn)
        if self._turn is not None:
            self.tracer.child(self.span, "inference", turn, self._facts).end(now)
        self.span.end(now)

    @property
    def parent(self) -> str:
        return self.tracer.header(self.span)

    def tell(self, queue_ms: float, facts: Facts) -> None:
        """Its turn came after so long."""
        self._turn, self._facts = self.began + int(queue_ms * NS_PER_MS), facts


@contextmanager
def at_replica(tracer: Tracer | None, parents: Sequence[str], facts: Facts) -> Iterator[dict[str, Any]]:
    """A span below each of `parents`, as long as the block runs; what it puts into the dictionary is told too."""
    found = dict(facts)
    if tracer is None or not parents:
        yield found
        return
    began = time.time_ns()
    try:
        yield found
    finally:
        for parent in parents:
            tracer.below(parent, "replica", began, found)


def open_tracer(config: TracingConfig) -> Tracer | None:
    """None where no endpoint is configured.

    Raises:
        UsageError: the exporter is not installed.
    """
    if config.endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UsageError("tracing.endpoint: the exporter is missing; pip install 'fettle[tracing]'") from None
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.endpoint)), config.share)
