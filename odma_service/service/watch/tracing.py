"""OpenTelemetry traces: a span for each call, and one for each batch of a stream.

A call continues the trace that its metadata name (W3C traceparent). A batch of a stream has no
metadata. So it begins a trace of its own, linked to the span of the stream, and is sampled by
itself; a stream may last for days.

docs/reference/observability.md lists the contents of a span. The OTEL_* variables, common to all
of OpenTelemetry, set the receiver and the share of calls. The extra `otel` has to be installed.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from threading import Thread

import grpc
import structlog

from odma_service.errors import OdmaError
from odma_service.service.door.handlers import CallShape
from odma_service.service.watch.observed import UNKNOWN_RPC, CallObserver, CallWatch
from odma_service.service.watch.spans import Spans
from odma_service.service.watch.telemetry import OP_NAMES
from odma_service.values import Allocate, Copy, Op, Place, Refusal, Result

try:
    from opentelemetry import context as contexts
    from opentelemetry import propagate, trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
except ImportError:
    raise OdmaError("traces need OpenTelemetry: pip install 'odma-service[otel]'") from None

FLUSH_SECONDS = 3.0
"""The last spans may take so long at shutdown; without a collector they are lost."""

PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

UNTRACED = ("grpc.health.", "grpc.reflection.")
"""Calls without a span: health probes, and listings of the services."""

FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Statuses that make a server's span an error: conventions for gRPC, "Recording errors"."""


log = structlog.get_logger()


class OtelSpans(Spans):
    """Spans sent to a collector, in a thread of their own; those that it cannot take are lost."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("odma_service", version("odma-service"))

    def observer(self) -> CallObserver:
        """Return the interceptor that makes the spans of calls. It has to be the first."""
        return _RpcSpans(self._tracer)

    def part(self, name: str) -> AbstractContextManager[object]:
        return self._tracer.start_as_current_span(
            name, record_exception=False, set_status_on_exception=False
        )

    def serves(self, pool: str, epoch: int) -> None:
        trace.get_current_span().set_attributes({"odma.pool": pool, "odma.epoch": epoch})

    def decided(self, ops: Sequence[Op], results: Sequence[Result], copies: Sequence[Copy]) -> None:
        span = trace.get_current_span()
        if not span.is_recording():
            return
        for name, count in Counter(OP_NAMES[type(op)] for op in ops).items():
            span.set_attribute(f"odma.operations.{name}", count)
        refused = Counter(
            f"{OP_NAMES[type(op)]} {result.reason.name}"
            for op, result in zip(ops, results, strict=True)
            if isinstance(result, Refusal)
        )
        span.set_attribute("odma.refusals", [f"{name} {n}" for name, n in sorted(refused.items())])
        placed = zip(ops, results, strict=True)
        span.set_attribute(
            "odma.reused_tokens",
            sum(
                place.reused_tokens
                for op, place in placed
                if isinstance(op, Allocate) and isinstance(place, Place)
            ),
        )
        span.set_attribute("odma.copies", len(copies))
        span.set_attribute("odma.copied_tokens", sum(copy.tokens for copy in copies))

    def event(self, kind: str, pool: str, reason: str) -> None:
        trace.get_current_span().add_event(kind, {"odma.pool": pool, "odma.reason": reason})

    def close(self) -> None:
        # The SDK ignores a limit of time.
        flush = Thread(target=self._provider.shutdown, name="traces", daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)


def otel_spans() -> OtelSpans:
    """Return spans sent as the OTEL_* variables say. Raises OdmaError."""
    for variable in PROTOCOL_VARIABLES:
        if os.environ.get(variable, "grpc") != "grpc":
            raise OdmaError(f"{variable}: traces are sent by grpc only")
    logging.getLogger("opentelemetry").addHandler(_ToLog())
    logging.getLogger("opentelemetry").propagate = False
    ours = {"service.name": "odma", "service.version": version("odma-service")}
    theirs = OTELResourceDetector().detect().attributes
    provider = TracerProvider(resource=Resource.create({**ours, **theirs}), shutdown_on_exit=False)
    try:
        exporter = OTLPSpanExporter()
    except Exception as error:  # noqa: BLE001  a wrong variable may raise anything
        raise OdmaError(f"traces cannot be sent: {error}") from None
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OtelSpans(provider)


class _RpcSpans(CallObserver):
    def __init__(self, tracer: trace.Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def watch(self, rpc: str, shape: CallShape, context: grpc.ServicerContext) -> CallWatch:
        if rpc.startswith(UNTRACED):
            return _Unwatched()
        sent = {key: value for key, value in context.invocation_metadata() if type(value) is str}
        span = _Span(self._tracer, rpc, parent=propagate.extract(sent))
        one_request = shape in {CallShape.UNARY, CallShape.SERVER_STREAM}
        return span if one_request else _Steps(span, self._tracer, rpc)


class _Unwatched:
    def asked(self, request: object) -> None:
        pass

    def answered(self) -> None:
        pass

    def ended(self, code: grpc.StatusCode) -> None:
        pass


class _Span(_Unwatched):
    """A span of a call, and the current span of the thread that answers it."""

    def __init__(
        self,
        tracer: trace.Tracer,
        rpc: str,
        *,
        parent: contexts.Context,
        links: Sequence[trace.Link] = (),
    ) -> None:
        package_and_service, _, name = rpc.rpartition(".")
        method = "_OTHER" if rpc == UNKNOWN_RPC else f"{package_and_service}/{name}"
        self.span = tracer.start_span(
            "grpc" if rpc == UNKNOWN_RPC else method,
            parent,
            trace.SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": method},
            links,
        )
        self._token = contexts.attach(trace.set_span_in_context(self.span, parent))

    def ended(self, code: grpc.StatusCode) -> None:
        self.span.set_attribute("rpc.response.status_code", code.name)
        if code in FAULTS:
            self.span.set_attribute("error.type", code.name)
            self.span.set_status(trace.StatusCode.ERROR)
        self.span.end()
        contexts.detach(self._token)


class _Steps:
    """The span of a stream, and one for each of its batches."""

    def __init__(self, stream: _Span, tracer: trace.Tracer, rpc: str) -> None:
        self._stream = stream
        self._tracer = tracer
        self._rpc = rpc
        self._step: _Span | None = None

    def asked(self, request: object) -> None:
        stream = trace.Link(self._stream.span.get_span_context())
        self._step = _Span(self._tracer, self._rpc, parent=contexts.Context(), links=[stream])

    def answered(self) -> None:
        self._end_step(grpc.StatusCode.OK)

    def ended(self, code: grpc.StatusCode) -> None:
        self._end_step(code)
        self._stream.ended(code)

    def _end_step(self, code: grpc.StatusCode) -> None:
        if self._step is not None:
            self._step.ended(code)
            self._step = None


class _ToLog(logging.Handler):
    """Puts complaints of the SDK among the lines of our own log."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning("traces", reason=record.getMessage())
