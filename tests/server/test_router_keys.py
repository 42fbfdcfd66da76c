"""API keys at the router, over real sockets, with a fake engine behind it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities.manifests import WORD_PROBLEMS, publish
from tests.server.fake_engine import FakeEngine, serving

CHAT = "/v1/chat/completions"
FRENCH_SUM = "Claire a 30 euros et achète 2 livres à 7 euros pièce. Combien d'argent lui reste-t-il ?"
# The secret of each key is its id with a tail.
ENTRIES: list[dict[str, Any]] = [
    {"id": "all", "roles": ["infer"]},
    {"id": "shop", "roles": ["infer"], "abilities": ["fr", "later"]},
    {"id": "canada", "roles": ["infer"], "abilities": ["quebec"]},
    {"id": "plain", "roles": ["infer"], "abilities": []},
    {"id": "operator", "roles": ["admin"]},
    {"id": "slow", "roles": ["infer"], "requests_per_minute": 30, "burst": 2},
]


def secret(name: str) -> str:
    return f"{name}-0123456789abcdef"


def keys_file(path: Path, entries: list[dict[str, Any]] = ENTRIES) -> Path:
    """Writes the file as an editor does: another one under its name."""
    whole = [{**entry, "sha256": hashlib.sha256(secret(entry["id"]).encode()).hexdigest()} for entry in entries]
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(whole))
    fresh.replace(path)
    return path


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret(name)}"}


def ask(client: httpx.Client, name: str, body: dict[str, Any]) -> httpx.Response:
    return client.post(CHAT, json={"messages": [], **body}, headers=bearer(name))


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    publish(root, "de", kind="language", languages=("de",))
    publish(root, "fr", kind="language", languages=("fr",))
    publish(root, "quebec", languages=("fr",))
    publish(root, "math", kind="skill", exemplars=WORD_PROBLEMS)
    return root


@pytest.fixture(scope="module")
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="module")
def client(
    engine: FakeEngine, store: Path, clock: FakeClock, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    settings = ServerSettings(
        store=store, keys=keys_file(tmp_path_factory.mktemp("keys") / "keys.json"), catalogue_refresh_s=0.01
    )
    replica = Replica("r1", engine.url, {"x-act-token": "hop"})
    app = build_app(settings, "base", lambda: FixedUpstream(replica), clock)
    with serving(app) as url, httpx.Client(base_url=url) as c:
        yield c


def refused(reply: httpx.Response, status: int, kind: str) -> str:
    """Checks an OpenAI error object and gives its message."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, status)
    return str(error["message"])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer nobody"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {secret('all')}"},
        {"Authorization": secret("all")},
        {"Authorization": f"Bearer {hashlib.sha256(secret('all').encode()).hexdigest()}"},
        {"x-api-key": "nobody"},
        {"x-api-key": ""},
        {"Authorization": "Bearer nobody", "x-api-key": secret("all")},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/abilities", "/v1/abilities/fr", "/v1/nothing"])
def test_without_a_known_key_there_is_nothing(
    client: httpx.Client, engine: FakeEngine, path: str, headers: dict[str, str]
) -> None:
    before = len(engine.requests)
    reply = client.get(path, headers=headers) if "chat" not in path else client.post(path, json={}, headers=headers)
    assert "key" in refused(reply, 401, "AuthenticationError")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert len(engine.requests) == before


@pytest.mark.parametrize(
    "headers",
    [
        bearer("all"),
        {"authorization": f"bearer  {secret('all')}"},
        {"X-API-Key": secret("all")},
        {"Authorization": "Basic eDp5", "x-api-key": secret("all")},
    ],
    ids=str,
)
def test_a_known_key_is_served_and_goes_no_further(
    client: httpx.Client, engine: FakeEngine, headers: dict[str, str]
) -> None:
    reply = client.post(CHAT, json={"abilities": ["math"]}, headers={**headers, "x-other": "kept"})
    assert reply.status_code == 200
    assert reply.headers["x-act-abilities"] == "math@1*1"
    seen = engine.requests[-1][1]
    assert seen["x-other"] == "kept"
    assert not seen.keys() & {"authorization", "x-api-key"}
    assert secret("all") not in str(engine.requests[-1])


def test_an_open_server_asks_for_nothing_and_passes_no_key_on(engine: FakeEngine, store: Path) -> None:
    replica = Replica("r1", engine.url)
    with serving(build_app(ServerSettings(store=store), "base", lambda: FixedUpstream(replica))) as url:
        assert httpx.post(url + CHAT, json={"abilities": ["fr"]}).status_code == 200
        assert httpx.post(url + CHAT, json={}, headers=bearer("anything")).status_code == 200
        assert len(httpx.get(f"{url}/v1/abilities").json()["data"]) == 4
    assert "authorization" not in engine.requests[-1][1]


def test_a_key_without_the_role_is_refused_but_may_look(client: httpx.Client) -> None:
    assert "'infer'" in refused(ask(client, "operator", {}), 403, "PermissionDeniedError")
    assert len(client.get("/v1/models", headers=bearer("operator")).json()["data"]) == 5


FORBIDDEN: list[tuple[dict[str, Any], str]] = [
    ({"abilities": ["math"]}, "math"),
    ({"abilities": ["fr", {"name": "math", "weight": 0.5}]}, "math"),
    ({"abilities": [{"name": "math", "version": 1}]}, "math"),
    ({"abilities": [{"name": "math", "version": 9}]}, "math"),
    ({"abilities": [{"name": "math", "scale": 0.001}]}, "math"),
    ({"abilities": ["nothing-of-that-name"]}, "nothing-of-that-name"),
    ({"merged_adapters": {"ids": ["fr", "math"], "weights": [1, 1]}}, "math"),
    ({"model": "base:math"}, "math"),
    ({"model": "base:fr+math*0.5"}, "math"),
    ({"model": f"base:math@1~{'0' * 12}"}, "math"),
    ({"language": "de"}, "de"),
    ({"language": "de-AT"}, "de"),
    ({"skill": "math"}, "math"),
    ({"language": "fr", "skill": "math"}, "math"),
]


@pytest.mark.parametrize(("body", "name"), FORBIDDEN, ids=str)
def test_other_abilities_are_refused_however_they_are_named(
    client: httpx.Client, engine: FakeEngine, body: dict[str, Any], name: str
) -> None:
    before = len(engine.requests)
    message = refused(ask(client, "shop", body), 403, "PermissionDeniedError")
    assert f"'{name}'" in message
    assert "it may use fr, later" in message
    assert len(engine.requests) == before
    if name != "nothing-of-that-name" and "9" not in str(body) and "~" not in str(body):
        assert ask(client, "all", body).status_code == 200, "the request itself is in order"


@pytest.mark.parametrize(
    ("name", "body", "used"),
    [
        ("shop", {"abilities": ["fr"]}, "fr@1*1"),
        ("shop", {"model": "base:fr*0.5"}, "fr@1*0.5"),
        ("shop", {"merged_adapters": {"ids": ["fr"]}}, "fr@1*1"),
        ("shop", {"language": "fr-FR"}, "fr@1*1"),
        ("shop", {}, ""),
        ("canada", {"language": "fr"}, "quebec@1*1"),
        ("plain", {"abilities": "none"}, ""),
    ],
)
def test_what_a_limited_key_may_use_is_served(client: httpx.Client, name: str, body: dict[str, Any], used: str) -> None:
    reply = ask(client, name, body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-act-abilities"] == used


def test_an_ability_that_a_key_may_use_is_found_when_it_is_published(client: httpx.Client, store: Path) -> None:
    missing = refused(ask(client, "shop", {"abilities": ["later"]}), 404, "UnknownAbilityError")
    assert "math" not in missing, "near names are those that the key may use"
    publish(store, "later")
    deadline = time.monotonic() + 30
    while ask(client, "shop", {"abilities": ["later"]}).status_code != 200:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("name", "used"),
    [("all", "fr@1*1,math@1*1"), ("shop", "fr@1*1"), ("canada", "quebec@1*1"), ("plain", "")],
)
def test_auto_chooses_among_what_the_key_may_use(client: httpx.Client, name: str, used: str) -> None:
    body = {"abilities": "auto", "messages": [{"role": "user", "content": FRENCH_SUM}]}
    reply = ask(client, name, body)
    while "yet" in reply.headers["x-act-reason"]:
        time.sleep(0.05)
        reply = ask(client, name, body)
    assert reply.headers["x-act-abilities"] == used
    assert reply.json()["act"]["auto"]


def test_the_servers_default_is_no_way_around(engine: FakeEngine, store: Path, tmp_path: Path) -> None:
    settings = ServerSettings(store=store, keys=keys_file(tmp_path / "keys"), default_abilities="math")
    app = build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url)))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        assert "'math'" in refused(ask(client, "shop", {}), 403, "PermissionDeniedError")
        assert ask(client, "all", {}).headers["x-act-abilities"] == "math@1*1"


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/octet-stream", "audio/wav"])
def test_a_body_whose_model_the_router_does_not_read_is_no_way_around(
    client: httpx.Client, engine: FakeEngine, kind: str
) -> None:
    before = len(engine.requests)
    content = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase:math\r\n--x--\r\n'
    path = "/v1/audio/transcriptions"
    reply = client.post(path, content=content, headers={**bearer("shop"), "content-type": kind})
    assert "JSON" in refused(reply, 403, "PermissionDeniedError")
    assert len(engine.requests) == before
    assert client.post(path, content=content, headers={**bearer("all"), "content-type": kind}).status_code == 200


def test_lists_show_what_the_key_may_use(client: httpx.Client) -> None:
    def names(path: str, field: str, key: str) -> list[str]:
        return [row[field] for row in client.get(path, headers=bearer(key)).json()["data"]]

    assert set(names("/v1/models", "id", "canada")) == {"base", "base:quebec"}
    assert names("/v1/models", "id", "plain") == ["base"]
    assert {"base:fr", "base:math"} < set(names("/v1/models", "id", "all"))
    assert names("/v1/abilities", "name", "canada") == ["quebec"]
    assert names("/v1/abilities", "name", "plain") == []
    assert client.get("/v1/abilities/quebec", headers=bearer("canada")).json()["name"] == "quebec"
    hidden = client.get("/v1/abilities/math", headers=bearer("canada"))
    assert "'math'" in refused(hidden, 403, "PermissionDeniedError")
    refused(client.get("/v1/abilities/nothing", headers=bearer("all")), 404, "UnknownAbilityError")


def test_what_operators_probe_stays_open(client: httpx.Client) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert client.get(path).status_code == 200


def test_metrics_can_need_a_key(engine: FakeEngine, store: Path, tmp_path: Path) -> None:
    settings = ServerSettings(store=store, keys=keys_file(tmp_path / "keys"), metrics_need_key=True)
    app = build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url)))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        refused(client.get("/metrics"), 401, "AuthenticationError")
        assert "act_requests" in client.get("/metrics", headers=bearer("operator")).text
        assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_a_key_over_its_rate_is_told_when_to_come_again(client: httpx.Client, clock: FakeClock) -> None:
    assert [ask(client, "slow", {}).status_code for _ in range(2)] == [200, 200]
    reply = ask(client, "slow", {})
    assert "'slow'" in refused(reply, 429, "RateLimitError")
    assert reply.headers["retry-after"] == "2", "30 a minute are one in 2 s"
    listed = client.get("/v1/models", headers=bearer("slow"))
    refused(listed, 429, "RateLimitError")
    assert listed.headers["retry-after"] == "2"
    assert ask(client, "all", {}).status_code == 200, "others have their own allowance"
    clock.now += 1.9
    assert ask(client, "slow", {}).status_code == 429
    clock.now += 0.2
    assert [ask(client, "slow", {}).status_code for _ in range(2)] == [200, 429]
    clock.now += 3600
    assert [ask(client, "slow", {}).status_code for _ in range(3)] == [200, 200, 429], "never more than the burst"


def test_a_changed_file_is_read_and_a_broken_one_is_not(
    engine: FakeEngine, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def until(name: str, status: int) -> None:
        deadline = time.monotonic() + 30
        while ask(client, name, {}).status_code != status:
            assert time.monotonic() < deadline, (name, status)
            time.sleep(0.02)

    def broken(content: str | None, said: str) -> None:
        caplog.clear()
        path.unlink() if content is None else path.write_text(content)
        deadline = time.monotonic() + 30
        while said not in caplog.text:
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.02)
        assert "the keys stay as they were" in caplog.text
        assert secret("late") not in caplog.text
        assert ask(client, "late", {}).status_code == 200
        assert ask(client, "shop", {}).status_code == 401

    path = keys_file(tmp_path / "keys.json")
    app = build_app(
        ServerSettings(store=store, keys=path, catalogue_refresh_s=0.02),
        "base",
        lambda: FixedUpstream(Replica("r1", engine.url)),
    )
    with serving(app) as url, httpx.Client(base_url=url) as client:
        assert ask(client, "shop", {}).status_code == 200
        assert ask(client, "late", {}).status_code == 401
        keys_file(path, [{"id": "late", "roles": ["infer"]}])
        until("shop", 401)
        until("late", 200)
        broken(f"- {{id: x, key: {secret('late')}", "keys.json:1: the keys file is not valid YAML")
        broken("", "a list with an entry for each key")
        broken(f"- {{id: x, roles: [infer], sha256: {secret('late')}}}", "entry 1, sha256")
        broken(None, "cannot be read")
        keys_file(path)
        until("shop", 200)
        until("late", 401)


def test_no_log_and_no_metric_shows_a_key(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    settings = ServerSettings(store=store, keys=keys_file(tmp_path / "keys"), catalogue_refresh_s=0.02)
    app = build_app(settings, "base", lambda: FixedUpstream(Replica("gone", "http://127.0.0.1:9")))
    texts = []
    with serving(app, log_level="debug") as url, httpx.Client(base_url=url) as client:
        for name in ("all", "shop", "operator", "stranger"):
            for body in ({}, {"abilities": ["math"]}, {"abilities": 7}):
                texts.append(ask(client, name, body).text)
                texts.append(client.post(CHAT, content=b"{", headers={"x-api-key": secret(name)}).text)
            texts.append(client.get("/v1/abilities/x", headers=bearer(name)).text)
        texts.append(client.get("/metrics").text)
    printed = capfd.readouterr()
    logs = caplog.text + printed.out + printed.err
    assert CHAT in logs, "the access log is on"
    assert "a replica failed" in logs
    for text in (logs, *texts):
        for name in ("all", "shop", "operator", "stranger"):
            assert secret(name) not in text
            assert hashlib.sha256(secret(name).encode()).hexdigest() not in text


def test_openais_client_understands_the_refusals(client: httpx.Client, clock: FakeClock) -> None:
    clock.now += 3600

    def chat(name: str, **fields: Any) -> object:
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=secret(name), max_retries=0) as sdk:
            return sdk.chat.completions.create(model="base", messages=[], extra_body=fields)

    chat("shop", abilities=["fr"])
    with pytest.raises(openai.AuthenticationError):
        chat("nobody")
    with pytest.raises(openai.PermissionDeniedError, match="'math'"):
        chat("shop", abilities=["math"])
    chat("slow")
    chat("slow")
    with pytest.raises(openai.RateLimitError, match="try again in 2"):
        chat("slow")
