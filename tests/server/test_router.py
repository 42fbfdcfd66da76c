"""The router's app over real sockets, with a fake engine behind it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from act_serve.abilities.catalogue import Catalogue, CatalogueView
from act_serve.delta.manifest import MANIFEST_FILE
from act_serve.errors import StoreError
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.route import Route
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities.manifests import WORD_PROBLEMS, publish
from tests.server.fake_engine import FakeEngine, serving

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    publish(root, "fr", kind="language", languages=("fr",))
    publish(root, "math", kind="skill", exemplars=WORD_PROBLEMS)
    publish(root, "torn")
    (root / "torn" / "1" / MANIFEST_FILE).write_text("{")
    return root


@pytest.fixture(scope="module")
def client(engine: FakeEngine, store: Path) -> Iterator[httpx.Client]:
    settings = ServerSettings(store=store, max_body_bytes=100_000, catalogue_refresh_s=0.01)
    replica = Replica("r1", engine.url, {"x-act-token": "secret"})
    with serving(build_app(settings, "base", lambda: FixedUpstream(replica))) as url, httpx.Client(base_url=url) as c:
        yield c


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_a_request_is_resolved_stripped_and_forwarded(client: httpx.Client, engine: FakeEngine) -> None:
    reply = client.post(f"{CHAT}?a=%2F", json={"abilities": [{"name": "fr", "weight": 0.5}], "messages": [], "n": 2})
    target, headers, body = engine.requests[-1]
    assert target == f"{CHAT}?a=%2F"
    assert body.keys() == {"model", "messages", "n"}
    assert body["model"].startswith("base:fr@1~")
    assert body["model"].endswith("*0.5")
    assert headers["x-act-token"] == "secret"
    assert headers["x-act-model"] == body["model"]
    assert reply.status_code == 200
    assert reply.headers["x-act-abilities"] == "fr@1*0.5"
    assert reply.json()["act"]["abilities"][0]["name"] == "fr"
    assert reply.json()["id"] == "x"
    assert int(reply.headers["content-length"]) == len(reply.content)


def test_the_base_alone_keeps_its_name_and_loads_nothing(client: httpx.Client, engine: FakeEngine) -> None:
    reply = client.post(CHAT, json={"messages": []}, headers={"x-act-model": "base:evil", "X-Act-Token": "guess"})
    _, headers, body = engine.requests[-1]
    assert body["model"] == "base"
    assert "x-act-model" not in headers
    assert headers["x-act-token"] == "secret", "a client must not reach the headers between router and engine"
    assert reply.json()["act"] == {"abilities": [], "auto": False, "reason": "the server's default"}


def test_the_content_type_may_be_missing(client: httpx.Client) -> None:
    assert client.post(CHAT, content=b'{"messages": []}').status_code == 200


def test_auto_reports_what_it_chose(client: httpx.Client) -> None:
    body = {"abilities": "auto", "messages": [{"role": "user", "content": "Quelle est la capitale de la France ?"}]}
    act = client.post(CHAT, json=body).json()["act"]
    assert act["auto"]
    assert [a["name"] for a in act["abilities"]] == ["fr"]
    assert "language fr" in act["reason"]


def auto(client: httpx.Client, *turns: str) -> httpx.Response:
    """Asks once the router knows its skills; user and assistant speak in turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    for _ in range(600):
        reply = client.post(CHAT, json={"abilities": "auto", "messages": messages})
        if "yet" not in reply.json()["act"]["reason"]:
            return reply
        time.sleep(0.05)
    raise AssertionError("the classifier of skills is never ready")


def test_auto_chooses_language_and_skill_and_says_why_in_body_and_header(client: httpx.Client) -> None:
    reply = auto(client, "Claire a 30 euros et achète 2 livres à 7 euros pièce. Combien d'argent lui reste-t-il ?")
    act = reply.json()["act"]
    assert reply.headers["x-act-abilities"] == "fr@1*1,math@1*1"
    assert reply.headers["x-act-reason"] == act["reason"]
    assert "language fr" in act["reason"]
    assert "skill math" in act["reason"]
    plain = auto(client, "Tell me about the history of Scotland.")
    assert plain.json()["act"]["abilities"] == []
    assert "no skill" in plain.headers["x-act-reason"]
    assert "x-act-reason" not in client.post(CHAT, json={"abilities": ["fr"]}).headers


def test_a_conversation_keeps_its_choice_unless_the_request_says_otherwise(client: httpx.Client) -> None:
    turns = ["Explique-moi la photosynthèse en deux phrases.", "Les plantes ...", "ok, thanks, and how old are oaks?"]
    assert (
        auto(client, *turns).headers["x-act-abilities"] == auto(client, turns[0]).headers["x-act-abilities"] == "fr@1*1"
    )
    messages = [{"role": "user", "content": turns[0]}, {"role": "user", "content": turns[2]}]
    assert (
        client.post(CHAT, json={"abilities": ["math"], "messages": messages}).headers["x-act-abilities"] == "math@1*1"
    )


def test_the_fields_of_lorax_reach_no_engine(client: httpx.Client, engine: FakeEngine) -> None:
    reply = client.post(CHAT, json={"merged_adapters": {"ids": ["fr", "math"], "weights": [1, 0.5]}, "messages": []})
    assert reply.headers["x-act-abilities"] == "fr@1*1,math@1*0.5"
    assert engine.requests[-1][2].keys() == {"model", "messages"}
    refused = client.post(CHAT, json={"merged_adapters": {"ids": ["fr"], "merge_strategy": "ties"}, "messages": []})
    assert refused.status_code == 400
    assert "act-serve merge" in refused.json()["error"]["message"]


@pytest.mark.parametrize("how", ["stream", "split head"])
def test_only_the_first_event_of_a_stream_is_changed(client: httpx.Client, how: str) -> None:
    reply = client.post(CHAT, json={"fake": how, "abilities": ["math"]})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-act-abilities"] == "math@1*1"
    first, *others = events(reply.text)
    assert first["act"]["abilities"][0]["name"] == "math"
    assert first["n"] == 0
    assert others == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert reply.text.endswith("data: [DONE]\n\n")


def test_events_arrive_while_the_engine_still_works(client: httpx.Client, engine: FakeEngine) -> None:
    engine.cancelled.clear()
    with client.stream("POST", CHAT, json={"fake": "endless"}) as reply:
        seen = 0
        for chunk in reply.iter_text():
            seen += chunk.count("data: {")
            if seen > 5:
                break
    assert engine.cancelled.wait(5), "a client that goes away must end the work in the engine"


def test_a_replica_that_dies_in_the_middle_ends_with_an_error_event(client: httpx.Client) -> None:
    reply = client.post(CHAT, json={"fake": "die"})
    *whole, last = events(reply.text)
    assert [event["n"] for event in whole] == [0, 1]
    assert last["error"]["code"] == 503
    assert "[DONE]" not in reply.text


def test_named_events_end_with_a_named_error(client: httpx.Client) -> None:
    reply = client.post("/v1/messages", json={"fake": "die"})
    assert "event: error\ndata: " in reply.text
    assert events(reply.text)[-1]["type"] == "error"


def test_the_engines_errors_pass_untouched(client: httpx.Client) -> None:
    reply = client.post(CHAT, json={"fake": "error", "abilities": ["fr"]})
    assert reply.status_code == 400
    assert reply.json() == {"error": {"message": "the engine's own words", "code": 400}}
    assert "x-act-abilities" not in reply.headers


def test_what_is_not_an_object_passes_untouched(client: httpx.Client) -> None:
    assert client.post(CHAT, json={"fake": "array"}).json() == [1, 2]


def test_uploads_and_other_methods_pass_untouched(client: httpx.Client, engine: FakeEngine) -> None:
    assert client.post("/v1/audio/transcriptions", files={"file": b"abc"}).status_code == 200
    assert "abc" in engine.requests[-1][2]
    assert client.get("/v1/responses/resp_1").status_code == 200
    assert engine.requests[-1][0] == "/v1/responses/resp_1"


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache", "/sleep", "/update_weights",
     "/collective_rpc", "/v1/../sleep", "/v1//x", "/v1/%2e%2e/sleep", "/nothing", "/"],
)  # fmt: skip
def test_what_steers_the_engine_is_not_reachable(client: httpx.Client, engine: FakeEngine, path: str) -> None:
    before = len(engine.requests)
    reply = client.post(httpx.URL(str(client.base_url)).copy_with(raw_path=path.encode()), json={})
    assert reply.status_code in (404, 405)
    assert len(engine.requests) == before


BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "not valid JSON"),
    (b"{", 400, "not valid JSON"),
    (b"[]", 400, "JSON object"),
    (b"null", 400, "JSON object"),
    (b'"text"', 400, "JSON object"),
    (b"\xff\xfe", 400, "not valid JSON"),
    (b'{"abilities": ["fr\x01"]}', 400, "not valid JSON"),
    (b'{"abilities": ["fr\\u0000"]}', 400, "not an ability name"),
    (b'{"abilities": [{"name": "fr", "weight": NaN}]}', 400, "NaN is not a JSON number"),
    (b'{"abilities": [{"name": "fr", "weight": Infinity}]}', 400, "Infinity is not a JSON number"),
    (b'{"abilities": [{"name": "fr", "weight": 1e999}]}', 400, "finite"),
    (b'{"abilities": [{"name": "fr", "weight": -1}]}', 400, "negative"),
    (b'{"abilities": ["..\\/..\\/etc\\/passwd"]}', 400, "not an ability name"),
    (b'{"abilities": ["fx"]}', 404, "no ability 'fx'"),
    (b'{"abilities": ["torn"]}', 422, "damaged"),
    (b'{"model": "gpt-4"}', 404, "it serves 'base'"),
    (b"[" * 90_000, 400, "not valid JSON"),
    (b'{"x": "' + b"y" * 200_000 + b'"}', 413, "limit of 100000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD_BODIES, ids=lambda value: str(value)[:40])
def test_bad_input_is_refused_in_openai_shape(client: httpx.Client, body: bytes, status: int, message: str) -> None:
    reply = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert message in error["message"]
    assert client.get("/health").status_code == 200


def test_an_announced_oversize_is_refused_without_reading_it(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=5) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_models_list_the_base_and_every_ability_in_order(client: httpx.Client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["base", "base:fr", "base:math"]
    assert [card["parent"] for card in cards] == [None, "base", "base"]


def test_abilities_are_listed_damaged_ones_too(client: httpx.Client) -> None:
    rows = {row["name"]: row for row in client.get("/v1/abilities").json()["data"]}
    assert rows["fr"]["languages"] == ["fr"]
    assert rows["math"]["status"] == "ready"
    assert rows["torn"]["status"] == "damaged"
    assert "ability.json" in rows["torn"]["damage"]


def test_one_ability_shows_its_manifest(client: httpx.Client) -> None:
    assert client.get("/v1/abilities/fr").json()["manifest"]["license"] == "Apache-2.0"
    assert client.get("/v1/abilities/torn").json()["manifest"] is None
    missing = client.get("/v1/abilities/maths")
    assert missing.status_code == 404
    assert "did you mean 'math'" in missing.json()["error"]["message"]
    assert client.get("/v1/abilities/..%2f..%2fetc").status_code == 404


def test_a_new_ability_is_served_at_once(client: httpx.Client, store: Path) -> None:
    publish(store, "brandnew")
    assert client.post(CHAT, json={"abilities": ["brandnew"]}).status_code == 200


def test_metrics_hold_the_router_and_every_replica(client: httpx.Client) -> None:
    client.post(CHAT, json={"abilities": ["fr"]})
    page = client.get("/metrics").text
    assert 'act_ability_requests_total{ability="fr"}' in page
    assert 'm{replica="r1",a="1"} 2.0' in page
    assert 'plain{replica="r1"} 3' in page
    assert page.count("# TYPE m counter") == 1


def test_ready_asks_the_engines(client: httpx.Client) -> None:
    assert client.get("/ready").json() == {"status": "ready", "replicas": 1, "alive": 1}


class Failover:
    """First replicas that fail, then one that works."""

    waiting = 0

    def __init__(self, *replicas: Replica) -> None:
        self.left = list(replicas)
        self.leases = 0

    @asynccontextmanager
    async def lease(self, route: Route, avoid: Collection[str] = ()) -> AsyncIterator[Replica]:
        self.leases += 1
        self.avoided = list(avoid)
        yield self.left.pop(0) if len(self.left) > 1 else self.left[0]

    async def replicas(self) -> Sequence[Replica]:
        return self.left


@pytest.mark.parametrize("how", ["", "stream"])
def test_a_replica_that_is_gone_is_replaced_by_another(engine: FakeEngine, store: Path, how: str) -> None:
    upstream = Failover(Replica("gone", "http://127.0.0.1:9"), Replica("r1", engine.url))
    with serving(build_app(ServerSettings(store=store), "base", lambda: upstream)) as url:
        reply = httpx.post(url + CHAT, json={"fake": how})
        assert reply.status_code == 200
        assert upstream.leases == 2
        assert "act_router_retries_total 1.0" in httpx.get(f"{url}/metrics").text


class Losing(Failover):
    """Every replica is lost a moment after its lease began."""

    @asynccontextmanager
    async def lease(self, route: Route, avoid: Collection[str] = ()) -> AsyncIterator[Replica]:
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.3, lost.set_result, "its node is gone")
        async with super().lease(route, avoid) as replica:
            yield dataclasses.replace(replica, lost=lost)


@pytest.mark.parametrize("how", ["hang", "hang in the head"])
def test_a_replica_that_hangs_is_given_up_when_it_is_lost(engine: FakeEngine, store: Path, how: str) -> None:
    upstream = Losing(Replica("r1", engine.url), Replica("r2", engine.url))
    with serving(build_app(ServerSettings(store=store), "base", lambda: upstream)) as url:
        reply = httpx.post(url + CHAT, json={"fake": how}, timeout=10)
        assert reply.status_code == 503
        assert "try again" in reply.json()["error"]["message"]
        assert upstream.leases == 2
        assert upstream.avoided == ["r1"]


def test_a_stream_of_a_lost_replica_ends_with_an_error_event(engine: FakeEngine, store: Path) -> None:
    upstream = Losing(Replica("r1", engine.url))
    with serving(build_app(ServerSettings(store=store), "base", lambda: upstream)) as url:
        reply = httpx.post(url + CHAT, json={"fake": "hang in the middle"}, timeout=10)
        *whole, last = events(reply.text)
        assert [event["n"] for event in whole] == [0, 1]
        assert last["error"]["code"] == 503
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_503_of_a_living_engine_is_the_answer(client: httpx.Client) -> None:
    reply = client.post(CHAT, json={"fake": "busy"})
    assert reply.status_code == 503
    assert reply.json() == {"error": {"message": "starting"}}


def test_headers_that_name_another_model_do_not_reach_the_engine(client: httpx.Client, engine: FakeEngine) -> None:
    headers = {"X-Amzn-SageMaker-Adapter-Identifier": "base:evil", "x-other": "kept"}
    assert client.post("/invocations", json={"messages": []}, headers=headers).status_code == 200
    seen = engine.requests[-1][1]
    assert "x-other" in seen
    assert not [name for name in seen if "sagemaker" in name]


def test_unknown_paths_add_no_time_series(client: httpx.Client) -> None:
    client.post(CHAT, json={})
    client.post("/v1/chat/strange", json={})
    client.get("/v1/responses/resp_77")
    client.get("/nowhere")
    page = client.get("/metrics").text
    assert 'act_requests_total{path="/v1/chat/completions",status="200"}' in page
    assert 'path="/v1/responses/{id}"' in page
    assert 'path="other"' in page
    assert not [word for word in ("strange", "resp_77", "nowhere") if word in page]


def test_a_store_that_cannot_be_read_does_not_hide_the_404(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, "fr")
    settings = ServerSettings(store=tmp_path, catalogue_refresh_s=60)
    readings = []
    real = Catalogue.refresh

    def refresh(catalogue: Catalogue) -> CatalogueView:
        if catalogue._store.root != tmp_path:  # of another test's server
            return real(catalogue)
        readings.append(catalogue)
        if len(readings) > 1:
            raise StoreError("no disk")
        return real(catalogue)

    monkeypatch.setattr(Catalogue, "refresh", refresh)
    with serving(build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url)))) as url:
        for model in ("gpt-4", "base:nothing", "base:nothing", "base:less"):
            reply = httpx.post(url + CHAT, json={"model": model})
            assert reply.status_code == 404, reply.text
    assert len(readings) == 2, "one at the start, one for the first unknown ability"


@pytest.mark.parametrize(
    ("model", "near"),
    [("fr", "did you mean 'base:fr'"), ("base-fr", "'base:fr'"), ("bases", "'base'"), ("gpt-4", 'give "abilities"')],
)
def test_a_foreign_model_is_answered_with_near_names(client: httpx.Client, model: str, near: str) -> None:
    reply = client.post(CHAT, json={"model": model})
    assert reply.status_code == 404
    assert near in reply.json()["error"]["message"]


def test_no_answer_shows_where_the_store_is(client: httpx.Client, store: Path) -> None:
    for reply in (
        client.get("/v1/abilities"),
        client.get("/v1/abilities/torn"),
        client.post(CHAT, json={"abilities": ["torn"]}),
        client.post(CHAT, json={"abilities": ["fx"]}),
    ):
        assert str(store) not in reply.text


@pytest.mark.parametrize("how", ["dead engine", "die at once", ""])
def test_two_failures_are_a_clear_503(engine: FakeEngine, store: Path, how: str) -> None:
    replica = Replica("r", engine.url if how else "http://127.0.0.1:9")
    upstream = Failover(replica, replica)
    with serving(build_app(ServerSettings(store=store), "base", lambda: upstream)) as url:
        reply = httpx.post(url + CHAT, json={"fake": how})
        assert reply.status_code == 503
        assert "try again" in reply.json()["error"]["message"]
        assert upstream.leases == 2
        if not how:
            assert httpx.get(f"{url}/ready").status_code == 503
