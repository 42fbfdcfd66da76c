"""What a router says about its requests: metrics, ids and log lines."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from act_serve.cli.metrics_page import parse_metrics
from act_serve.errors import OverloadedError
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.metrics import RouterMetrics
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities.manifests import publish
from tests.server.admin_server import keys_file
from tests.server.fake_engine import FakeEngine, serving

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    publish(tmp_path, "fr", kind="language", languages=("fr",))
    publish(tmp_path, "math")
    return tmp_path


@pytest.fixture
def client(engine: FakeEngine, store: Path) -> Iterator[httpx.Client]:
    app = build_app(
        ServerSettings(store=store, log_format="json"), "base", lambda: FixedUpstream(Replica("r1", engine.url))
    )
    with serving(app) as url, httpx.Client(base_url=url) as client:
        yield client


def total(client: httpx.Client, metric: str, **labels: str) -> float:
    page = parse_metrics(client.get("/metrics").text, 0)
    return page.sum(metric, lambda found: labels.items() <= found.items())


def lines(caplog: pytest.LogCaptureFixture, number: int) -> list[str]:
    """The log's lines; they are written when the client has its answer already, so not always in order."""
    for _ in range(200):
        found = [r.getMessage() for r in caplog.records if r.name == "act_serve.requests"]
        if len(found) >= number:
            break
        time.sleep(0.02)
    return found


def test_tokens_are_those_of_the_usage_or_else_the_events(client: httpx.Client) -> None:
    client.post(CHAT, json={"fake": "usage", "abilities": ["fr"]})
    assert total(client, "act_generated_tokens_total", ability="fr") == 7
    client.post(CHAT, json={"fake": "stream with usage", "abilities": ["math"]})
    assert total(client, "act_generated_tokens_total", ability="math") == 9
    client.post(TEXT, json={"fake": "stream"})
    assert total(client, "act_generated_tokens_total", ability="none") == 4, "four events"
    client.post(CHAT, json={"fake": "stream"})
    assert total(client, "act_generated_tokens_total", ability="none") == 4 + 3, "a chat's first names the role"
    assert total(client, "act_time_to_first_token_seconds_count", ability="none") == 2
    assert total(client, "act_time_between_tokens_seconds_count", ability="none") == 3 + 2
    assert total(client, "act_time_between_tokens_seconds_count", ability="math") == 2, "a usage is no token"
    assert total(client, "act_time_between_tokens_seconds_sum", ability="none") > 5 * 0.01


def test_a_stream_that_breaks_counts_what_was_sent(client: httpx.Client) -> None:
    client.post(TEXT, json={"fake": "die", "abilities": ["fr"]})
    assert total(client, "act_generated_tokens_total", ability="fr") == 2
    client.post(TEXT, json={"fake": "error", "abilities": ["fr"]})
    assert total(client, "act_generated_tokens_total", ability="fr") == 2


def test_the_abilities_of_the_labels_are_bounded() -> None:
    metrics = RouterMetrics()
    labels = {metrics.label(f"a{n}") for n in range(1000)}
    assert len(labels) == 51
    assert metrics.label("a0") == "a0"
    assert metrics.label("a999") == "other"


def test_the_routers_own_routes_are_counted_and_probes_are_not(client: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/abilities/fr", "/v1/abilities/none", "/health", "/ready", "/nowhere"):
        client.get(path)
    assert total(client, "act_requests_total", path="/v1/models", status="200") == 1
    assert total(client, "act_requests_total", path="/v1/abilities/{name}", status="200") == 1
    assert total(client, "act_requests_total", path="/v1/abilities/{name}", status="404") == 1
    assert total(client, "act_requests_total", path="other", status="404") == 1
    assert total(client, "act_requests_total") == 4


def test_a_server_that_is_not_ready_counts_no_errors(store: Path) -> None:
    gone = FixedUpstream(Replica("r1", "http://127.0.0.1:9"))
    with serving(build_app(ServerSettings(store=store), "base", lambda: gone)) as url, httpx.Client(base_url=url) as c:
        assert c.get("/ready").status_code == 503
        assert total(c, "act_requests_total") == 0


class Full(FixedUpstream):
    def lease(self, route: Any, avoid: Any = ()) -> Any:
        raise OverloadedError("every queue is full")


def test_rejections_have_reasons(engine: FakeEngine, store: Path, tmp_path: Path) -> None:
    file = keys_file(tmp_path, shop={"roles": ["infer"], "requests_per_minute": 2})
    app = build_app(ServerSettings(store=store, keys=file), "base", lambda: Full(Replica("r1", engine.url)))
    with serving(app) as url, httpx.Client(base_url=url, headers={"x-api-key": "the shop"}) as client:
        assert [client.post(CHAT, json={}).status_code for _ in range(2)] == [429, 429]
        assert client.get("/v1/models").status_code == 429
        assert client.post(CHAT, json={}).status_code == 429
        assert total(client, "act_rejections_total", reason="queue_full") == 2
        assert total(client, "act_rejections_total", reason="rate_limit") == 2


@pytest.mark.parametrize("path", ["/v1/models", "/health", CHAT, "/nowhere", "/v1/abilities/none"])
def test_every_answer_has_the_requests_id(client: httpx.Client, engine: FakeEngine, path: str) -> None:
    method = "POST" if path == CHAT else "GET"
    given = client.request(method, path, json={}, headers={"X-Request-Id": "trace-1.a_b:c"})
    assert given.headers.get_list("x-request-id") == ["trace-1.a_b:c"]
    for wrong in ("a b", "x" * 129, 'a"b', "ü".encode("latin-1")):
        made = client.request(method, path, json={}, headers={b"x-request-id": wrong})
        assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])
    if path == CHAT:
        assert engine.requests[-1][1]["x-request-id"] == made.headers["x-request-id"]


def test_the_server_in_front_names_what_it_named(engine: FakeEngine, store: Path) -> None:
    upstream = FixedUpstream(Replica("r1", engine.url))
    app = build_app(ServerSettings(store=store), "base", lambda: upstream, named_in_front=True)
    with serving(app) as url:
        assert "x-request-id" not in httpx.get(f"{url}/health", headers={"x-request-id": "good"}).headers
        assert "x-request-id" in httpx.get(f"{url}/health", headers={"x-request-id": "not good"}).headers


def test_a_request_is_one_json_line(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "act_serve.requests")
    client.post(f"{CHAT}?a=b", json={"fake": "usage", "abilities": ["fr"]}, headers={"x-request-id": "one"})
    client.get("/v1/abilities/none%0A", headers={"x-request-id": "two"})
    client.get("/health")
    two, one = sorted(map(json.loads, lines(caplog, 2)), key=lambda line: line["method"])
    assert 0 < one.pop("seconds") < 60
    assert one.pop("time").endswith("+00:00")
    assert one == {
        "request_id": "one", "key": "anyone", "method": "POST", "path": CHAT, "status": 200,
        "composition": "fr@1*1", "tokens": 7, "error": None,
    }  # fmt: skip
    assert (two["request_id"], two["status"], two["error"]) == ("two", 404, "UnknownAbilityError")
    assert two["path"] == "/v1/abilities/none%0A", "a line break in a path is none in the log"


def test_a_plain_line_says_the_same(engine: FakeEngine, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "act_serve.requests")
    app = build_app(ServerSettings(store=store), "base", lambda: FixedUpstream(Replica("r1", engine.url)))
    with serving(app) as url:
        httpx.post(url + CHAT, json={"fake": "usage", "abilities": ["fr"]}, headers={"x-request-id": "one"})
    (line,) = lines(caplog, 1)
    assert re.fullmatch(rf"one POST {CHAT} 200 key=anyone composition=fr@1\*1 seconds=[\d.]+ tokens=7", line)
