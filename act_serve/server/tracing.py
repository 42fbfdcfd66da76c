"""Spans of requests, sent to an OpenTelemetry collector; the engines' spans hang below.

Needs the extra ``otel``, so it is imported only where the setting ``otlp_endpoint`` asks for it.
"""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Scope

from act_serve import __version__
from act_serve.server.request_record import RequestRecord

_CONTEXT = TraceContextTextMapPropagator()


class RequestTracer:
    """Makes a span of every request; batches of them are sent by a thread, and lost where no collector answers.

    Args:
        endpoint: URL that takes OTLP over HTTP, such as http://collector:4318/v1/traces.
    """

    def __init__(self, endpoint: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "act-serve-router"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("act_serve", __version__)

    def begin(self, scope: Scope) -> Span:
        """Starts the span of a request, below the client's if its ``traceparent`` names one, and the engine's parent.

        Names follow https://opentelemetry.io/docs/specs/semconv/http/http-spans.
        """
        parent = _CONTEXT.extract(dict(Headers(scope=scope)))
        span = self._tracer.start_span(scope["method"], parent, SpanKind.SERVER)
        carrier: dict[str, str] = {}
        _CONTEXT.inject(carrier, set_span_in_context(span))
        headers = MutableHeaders(scope=scope)
        for name, value in carrier.items():
            headers[name] = value
        return span

    def end(self, span: Span, record: RequestRecord, route: str, status: int) -> None:
        """Ends a request's span with what became of it."""
        span.update_name(f"{record.method} {route}")
        known: dict[str, str | int | None] = {
            "http.request.method": record.method,
            "http.route": route,
            "http.response.status_code": status,
            "act.request_id": record.id,
            "act.key": record.key,
            "act.composition": record.composition,
            "act.tokens": record.tokens,
            "error.type": record.error,
        }
        span.set_attributes({name: value for name, value in known.items() if value is not None})
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Sends what is left; may take some seconds where no collector answers."""
        self._provider.shutdown()
