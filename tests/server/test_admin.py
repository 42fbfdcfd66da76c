"""Changing what a running router serves, over HTTP."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx

from act_serve.abilities.desired_state import STATE_FILE
from act_serve.abilities.store import Store
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.upstream import FixedUpstream, Replica
from tests.server.admin_server import ADMIN, CHAT, Server, tar, zipped
from tests.server.fake_engine import FakeEngine, serving


def until(condition: Any) -> None:
    while not condition():
        time.sleep(0.02)


def test_an_uploaded_ability_is_served_at_once_by_this_router_and_soon_by_others(server: Server) -> None:
    assert server.used() == "404"
    reply = server.upload("fr", 1)
    assert reply.status_code == 201, reply.text
    assert reply.json()["added"] == reply.json()["version"] == 1
    assert server.used() == "fr@1*1"
    start = time.monotonic()
    until(lambda: server.used(client=server.second_router) == "fr@1*1")
    assert time.monotonic() - start < 2
    assert Store(server.root).manifest("fr") == server.shelf.manifest("fr", 1)
    assert server.left() == ["fr"]


def test_the_three_ways_to_send_an_archive(server: Server) -> None:
    data = zipped(server.folder("fr", 1))
    form = server.client.post("/v1/abilities", files={"archive": ("fr.zip", data)}, headers=ADMIN)
    assert form.status_code == 201, form.text
    raw = server.client.post(
        "/v1/abilities", content=iter([data[:100], data[100:]]), headers={**ADMIN, "content-type": "application/zip"}
    )
    assert raw.status_code == 409
    assert "publish a new version" in raw.json()["error"]["message"]
    packed = tar(server.folder("fr", 2))
    form = server.client.post("/v1/abilities", files={"archive": ("fr.tar.gz", packed)}, headers=ADMIN)
    assert form.status_code == 201, form.text
    source = server.post("/v1/abilities", {"name": "math", "source": f"file://{server.folder('math', 1)}"})
    assert source.status_code == 201, source.text
    assert server.left() == ["fr", "math"]


def test_versions_are_activated_rolled_back_and_shown(server: Server) -> None:
    server.upload("fr", 1)
    server.upload("fr", 2)
    assert server.used() == "fr@2*1"
    assert server.post("/v1/abilities/fr/activate", {"version": 1}).json()["version"] == 1
    assert server.used() == "fr@1*1"
    assert server.post("/v1/abilities/fr/pin", {"pinned": True}).status_code == 200
    shown = server.client.get("/v1/abilities/fr", headers=ADMIN).json()
    assert (shown["version"], shown["versions"], shown["pinned"], shown["draining"]) == (1, [1, 2], True, [])
    assert shown["manifest"]["version"] == 1
    until(lambda: server.used(client=server.second_router) == "fr@1*1")
    server.post("/v1/abilities/fr/pin", {"pinned": False})
    assert server.post("/v1/abilities/fr/activate", {"version": 9}).status_code == 404
    assert json.loads((server.root / STATE_FILE).read_text())["abilities"] == {
        "fr": {"active": 1, "pinned": False, "removed": {}}
    }


def test_the_choice_survives_the_router(server: Server, engine: FakeEngine) -> None:
    server.upload("fr", 1)
    server.upload("fr", 2)
    server.post("/v1/abilities/fr/activate", {"version": 1})
    settings = ServerSettings(store=server.root)
    with serving(build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url, {})))) as url:
        reply = httpx.post(f"{url}{CHAT}", json={"abilities": ["fr"], "messages": []})
    assert reply.headers["x-act-abilities"] == "fr@1*1"


def test_removed_versions_drain_and_are_gone(server: Server) -> None:
    server.upload("fr", 1)
    server.upload("fr", 2)
    refused = server.client.delete("/v1/abilities/fr/versions/2", headers=ADMIN)
    assert refused.status_code == 409
    removed = server.client.delete("/v1/abilities/fr/versions/1", headers=ADMIN).json()
    assert (removed["removed"], removed["versions"], removed["draining"]) == ([1], [2], [1])
    until(lambda: not (server.root / "fr" / "1").exists())
    until(lambda: server.client.get("/v1/abilities/fr", headers=ADMIN).json()["draining"] == [])
    assert server.client.delete("/v1/abilities/fr", headers=ADMIN).json()["removed"] == [2]
    assert server.used() == "404"
    until(lambda: server.left() == ["fr"])  # the files go after the name
    assert server.client.delete("/v1/abilities/fr", headers=ADMIN).status_code == 404


def test_a_request_in_flight_keeps_its_version_while_it_is_replaced_and_removed(server: Server) -> None:
    server.upload("fr", 1)
    lines: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def stream() -> None:
        body = {"abilities": ["fr"], "messages": [], "fake": "stream", "stream": True}
        headers = {"authorization": "Bearer the user"}
        with httpx.stream("POST", f"{server.client.base_url}{CHAT}", json=body, headers=headers) as reply:
            assert reply.headers["x-act-abilities"] == "fr@1*1"
            for line in reply.iter_lines():
                lines.append(line)
                begun.set()
                go_on.wait()

    thread = threading.Thread(target=stream)
    thread.start()
    begun.wait()
    server.upload("fr", 2)
    server.client.delete("/v1/abilities/fr/versions/1", headers=ADMIN)
    assert Store(server.root).manifest("fr", 1).version == 1, "its files are there as long as it may need them"
    go_on.set()
    thread.join()
    assert "data: [DONE]" in lines
    assert server.engine.requests[-1][2]["model"].startswith("base:fr@1~")
    assert server.used() == "fr@2*1"


def test_vllms_routes_for_adapters(server: Server) -> None:
    server.upload("fr", 1)
    server.post("/v1/abilities/fr/activate", {"version": 1})
    path = str(server.folder("fr", 2))
    loaded = server.post("/v1/load_lora_adapter", {"lora_name": "fr", "lora_path": path})
    assert loaded.text == "Success: LoRA adapter 'fr' added successfully."
    assert server.used() == "fr@2*1"
    assert server.post("/v1/load_lora_adapter", {"lora_name": "de", "lora_path": path}).status_code == 400
    assert server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}).status_code == 400
    unloaded = server.post("/v1/unload_lora_adapter", {"lora_name": "fr"})
    assert unloaded.text == "Success: LoRA adapter 'fr' removed successfully."
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "fr"}).status_code == 404
