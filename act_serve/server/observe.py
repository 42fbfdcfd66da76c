"""Around every request: its id, its line in the log, and its place in ``act_requests_total``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from act_serve.server.config import LogFormat
from act_serve.server.http_errors import send_error
from act_serve.server.metrics import RouterMetrics
from act_serve.server.paths import path_label
from act_serve.server.request_log import log_request
from act_serve.server.request_record import REQUEST_ID_HEADER, RequestRecord

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from act_serve.server.tracing import RequestTracer

# What probes ask every few seconds would hide what clients ask, and the 503 of a server that starts would raise alerts.
_PROBES = frozenset({"/health", "/ready", "/metrics"})
_REJECTIONS = {"OverloadedError": "queue_full", "RateLimitError": "rate_limit"}


@dataclass(frozen=True, slots=True)
class Observed:
    """ASGI middleware of the router's apps; plain ASGI, so streams pass untouched.

    Args:
        app: what answers.
        metrics: of the router.
        log_format: of the log's lines.
        named_in_front: a server in front adds the request's header ``x-request-id`` to the answer itself, as Ray
            Serve's does, so that it is added here only where it differs.
        tracer: makes spans of requests that are no probes; None makes none.
    """

    app: ASGIApp
    metrics: RouterMetrics
    log_format: LogFormat
    named_in_front: bool = False
    tracer: RequestTracer | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; what was not foreseen is answered with an error object, too."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER)
        record = RequestRecord.begin(scope)
        MutableHeaders(scope=scope)[REQUEST_ID_HEADER] = record.id  # the engine gets it with the others
        span = None if self.tracer is None or scope["path"] in _PROBES else self.tracer.begin(scope)
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(raw=list(message["headers"]))
                del answer[REQUEST_ID_HEADER]
                if not (self.named_in_front and given == record.id):
                    answer.append(REQUEST_ID_HEADER, record.id)
                message = {**message, "headers": answer.raw}
            await send(message)

        try:
            await self.app(scope, receive, named)
        except Exception as exc:
            record.error = type(exc).__name__
            if status:
                raise
            await send_error(named, exc)
        finally:
            # A request that is cancelled before its answer has the status of a client that has gone.
            self._ended(scope, record, record.status or status or 499, span)

    def _ended(self, scope: Scope, record: RequestRecord, status: int, span: Span | None) -> None:
        path = scope["path"]
        if path in _PROBES:
            return
        route = scope.get("route")
        label = route.path if isinstance(route, APIRoute) else path_label(path)  # the router's own, or an engine's
        if self.tracer is not None and span is not None:
            self.tracer.end(span, record, label, status)
        self.metrics.requests.labels(label, status).inc()
        if record.error in _REJECTIONS:
            self.metrics.rejections.labels(_REJECTIONS[record.error]).inc()
        log_request(record, status, time.perf_counter() - record.started_s, self.log_format)
