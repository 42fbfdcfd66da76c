from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.types import Message, Receive, Scope, Send

from act_serve.errors import ModelError, OverloadedError, ProfileError
from act_serve.server import lease as lease_module
from act_serve.server.config import ServerSettings, read_settings
from act_serve.server.http_errors import error_object, send_error
from act_serve.server.lease import DEAD_HEADER, LEASE_HEADER, TOKEN_HEADER, Leases
from act_serve.server.lost import ReplicaLostError, until_lost
from act_serve.server.metrics import merge_pages
from act_serve.server.model_source import EMBEDDED_NAME, check_default_abilities, model_source
from act_serve.server.paths import path_label
from act_serve.server.splice import into_first_event, into_object, whole_events
from tests.abilities.manifests import publish


def test_splicing_into_objects() -> None:
    assert into_object(b'{"a": 1}', b"{}") == b'{"act":{},"a": 1}'
    assert into_object(b"{ }", b"{}") == b'{"act":{} }'
    assert into_object(b"[1]", b"{}") == b"[1]"
    assert into_object(b"", b"{}") == b""


def test_splicing_into_events() -> None:
    assert into_first_event(b': ping\n\nevent: e\ndata: {"a": 1}\n\n', b"2") == (
        b': ping\n\nevent: e\ndata: {"act":2,"a": 1}\n\n'
    )
    assert into_first_event(b"data: [DONE]\n\n", b"2") == b"data: [DONE]\n\n"


@pytest.mark.parametrize("pending", [b"", b"a", b"a\n", b"a\n\n", b"a\n\nb", b"a\n\nb\n\n", b"\n\n"])
def test_whole_events_lose_nothing_and_end_at_a_border(pending: bytes) -> None:
    whole, rest = whole_events(pending)
    assert whole + rest == pending
    assert whole == b"" or whole.endswith(b"\n\n")
    assert b"\n\n" not in rest


def test_pages_are_merged_metric_by_metric() -> None:
    page = "# HELP m h\n# TYPE m counter\nm 1\n# TYPE n gauge\nn{} 2\n"
    merged = merge_pages("own 1\n", {"a": page, "b": page})
    assert merged == (
        'own 1\n# HELP m h\n# TYPE m counter\nm{replica="a"} 1\nm{replica="b"} 1\n'
        '# TYPE n gauge\nn{replica="a"} 2\nn{replica="b"} 2\n'
    )


def test_settings_from_text_as_serve_run_gives_them() -> None:
    settings = read_settings({"max_num_seqs": "8", "enforce_eager": "false", "engine_args": '{"seed": 1}'})
    assert (settings.max_num_seqs, settings.enforce_eager, settings.engine_args) == (8, False, {"seed": 1})
    assert read_settings(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"nonsense": 1}, "'nonsense'"),
        ({"max_num_seqs": 0}, "'max_num_seqs'"),
        ({"default_abilities": "a b"}, "none, auto or a composition"),
        ({"engine_args": "{"}, "'engine_args': give .* as a JSON object"),
        ({"engine_args": "[1]"}, "as a JSON object"),
        ({"engine_args": {"additional_config": {}}}, "use the settings store, max_resident_bytes and"),
        ({"engine_args": {"max-loras": 4}}, "use the setting max_num_seqs"),
        ({"engine_args": {"worker_cls": "x"}}, "act-serve sets it itself"),
        ({"engine_args": {"model": "x"}}, "setting of its own"),
    ],
)
def test_wrong_settings_are_named(args: dict[str, object], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        read_settings(args)


def test_a_default_that_the_store_does_not_have_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, "fr")
    check_default_abilities(ServerSettings(store=tmp_path, default_abilities="fr*0.5"))
    check_default_abilities(ServerSettings(store=tmp_path, default_abilities="auto"))
    with pytest.raises(ProfileError, match=r"'default_abilities': no ability 'frr' .* did you mean 'fr'"):
        check_default_abilities(ServerSettings(store=tmp_path, default_abilities="frr"))


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/responses/resp_1", "/v1/responses/{id}"),
        ("/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel"),
        ("/v1/responses/resp_1/x", "other"),
        ("/v1/chat/anything", "other"),
        ("/v1/nothing", "other"),
        ("/tokenize", "/tokenize"),
    ],
)
def test_paths_are_counted_under_a_fixed_set_of_labels(path: str, label: str) -> None:
    assert path_label(path) == label


def test_the_model_is_named_after_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    with pytest.raises(ModelError, match=r"config\.json"):
        model_source(ServerSettings(model=folder))
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert model_source(ServerSettings(model=folder)) == (folder, "my-model")
    assert model_source(ServerSettings(model=folder, served_model_name="n"))[1] == "n"
    assert model_source(ServerSettings()) == (None, EMBEDDED_NAME)


async def test_overload_says_when_to_come_back() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    assert await send_error(send, OverloadedError("full", retry_after_s=3)) == 429
    assert (b"retry-after", b"3") in sent[0]["headers"]


def test_an_unforeseen_error_tells_no_internals() -> None:
    status, body = error_object(KeyError("a secret"))
    assert status == 500
    assert "secret" not in body["error"]["message"]


@pytest.fixture(autouse=True)
def _no_long_wait_for_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "UNHELD_S", 0.05)


async def call(leases: Leases, lease: str, token: str = "t") -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(TOKEN_HEADER.encode(), token.encode()), (LEASE_HEADER.encode(), lease.encode())]
    await leases({"type": "http", "headers": headers}, receive, send)
    return sent


def gated(gate: asyncio.Event) -> Leases:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return Leases(app, "t")


async def test_a_lease_lasts_as_long_as_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "UNCLAIMED_S", 0.05)
    gate = asyncio.Event()
    leases = gated(gate)
    held, request = asyncio.create_task(leases.hold("a")), asyncio.create_task(call(leases, "a"))
    await asyncio.sleep(0.2)
    assert not held.done()
    gate.set()
    await asyncio.wait_for(held, 5)
    assert (await request)[0]["status"] == 200


async def test_an_answer_waits_for_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "UNHELD_S", 60.0)
    gate = asyncio.Event()
    gate.set()
    leases = gated(gate)
    request = asyncio.create_task(call(leases, "a"))
    await asyncio.sleep(0.1)
    assert not request.done()
    held = asyncio.create_task(leases.hold("a"))
    assert (await asyncio.wait_for(request, 5))[0]["status"] == 200
    await asyncio.wait_for(held, 5)


async def test_a_lease_whose_request_never_comes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "UNCLAIMED_S", 0.05)
    await asyncio.wait_for(gated(asyncio.Event()).hold("a"), 5)


async def test_a_request_that_is_cancelled_ends_its_lease() -> None:
    leases = gated(asyncio.Event())
    held, request = asyncio.create_task(leases.hold("a")), asyncio.create_task(call(leases, "a"))
    await asyncio.sleep(0)
    request.cancel()
    await asyncio.wait_for(held, 5)


async def test_a_request_that_ends_before_its_lease_is_known() -> None:
    gate = asyncio.Event()
    gate.set()
    leases = gated(gate)
    await call(leases, "a")
    await asyncio.wait_for(leases.hold("a"), 5)


async def test_only_the_router_reaches_the_engine() -> None:
    assert (await call(gated(asyncio.Event()), "", token="wrong"))[0]["status"] == 401


@pytest.mark.parametrize(
    ("status", "kind", "dead", "marked"),
    [
        (500, b"application/json", True, True),
        (500, b"application/json", False, False),
        (200, b"application/json", True, False),
        (200, b"text/event-stream; charset=utf-8", True, True),
        (200, b"text/event-stream; charset=utf-8", False, False),
    ],
)
async def test_the_answers_of_a_dead_engine_are_marked(status: int, kind: bytes, dead: bool, marked: bool) -> None:
    died = False

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal died
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        died = dead  # after the head, before the first byte
        await send({"type": "http.response.body", "body": b"{}"})

    start, body = await call(Leases(app, "t", lambda: died), "a")
    assert (DEAD_HEADER.encode() in dict(start["headers"])) is marked
    assert body["body"] == b"{}"


async def test_a_lost_replica_ends_the_wait_and_nothing_else() -> None:
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.05, lost.set_result, "it died")
    with pytest.raises(ReplicaLostError, match="it died"):
        async with until_lost(lost):
            await asyncio.sleep(60)
    await asyncio.sleep(0)  # the task itself is not cancelled
    async with until_lost(asyncio.get_running_loop().create_future()):
        pass


async def test_a_cancelled_wait_stays_cancelled() -> None:
    async def wait() -> None:
        async with until_lost(asyncio.get_running_loop().create_future()):
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
