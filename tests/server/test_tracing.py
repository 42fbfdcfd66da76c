"""Spans of requests, at a receiver of OTLP over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities.manifests import publish
from tests.server.fake_engine import FakeEngine, serving

CHAT = "/v1/chat/completions"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"

messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")


class Collector:
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.app = Starlette(routes=[Route("/v1/traces", self._take, methods=["POST"])])

    async def _take(self, request: Request) -> Response:
        sent = messages.ExportTraceServiceRequest.FromString(await request.body())
        self.spans += [s for resource in sent.resource_spans for scope in resource.scope_spans for s in scope.spans]
        return Response()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_a_span_joins_the_clients_trace_and_the_engines(engine: FakeEngine, tmp_path: Path) -> None:
    publish(tmp_path, "fr")
    collector = Collector()
    with serving(collector.app) as address:
        settings = ServerSettings(store=tmp_path, otlp_endpoint=f"{address}/v1/traces")
        with serving(build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url)))) as url:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "one"}
            httpx.post(url + CHAT, json={"fake": "usage", "abilities": ["fr"]}, headers=headers)
            passed_on = engine.requests[-1][1]["traceparent"].split("-")
            httpx.get(f"{url}/v1/abilities/none")
            httpx.get(f"{url}/health")
    one, two = sorted(collector.spans, key=lambda span: span.name, reverse=True)
    assert (one.name, two.name) == (f"POST {CHAT}", "GET /v1/abilities/{name}")
    assert (one.trace_id.hex(), one.parent_span_id.hex()) == (TRACE, PARENT)
    assert passed_on[1:3] == [TRACE, one.span_id.hex()], "the engine's span hangs below the router's"
    assert attributes(one) == {
        "http.request.method": "POST", "http.route": CHAT, "http.response.status_code": 200, "act.request_id": "one",
        "act.key": "anyone", "act.composition": "fr@1*1", "act.tokens": 7,
    }  # fmt: skip
    assert not two.parent_span_id
    assert attributes(two)["error.type"] == "UnknownAbilityError"


def test_a_collector_that_is_gone_costs_no_request(engine: FakeEngine, tmp_path: Path) -> None:
    settings = ServerSettings(store=tmp_path, otlp_endpoint="http://127.0.0.1:9/v1/traces")
    with serving(build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url)))) as url:
        assert httpx.post(url + CHAT, json={}).status_code == 200
