"""Abilities are changed at the control address alone, when there is one."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from act_serve.abilities.store import Store
from act_serve.errors import ProfileError
from act_serve.server import control_listener
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings, read_settings
from act_serve.server.control_listener import listening
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities_for_tests import publish_random
from tests.ports import free_port
from tests.server.admin_server import ADMIN, keys_file, tar
from tests.server.fake_engine import FakeEngine, serving


def test_changes_are_made_there_and_refused_at_the_clients_address(
    engine: FakeEngine, tiny_llama: Path, tmp_path: Path
) -> None:
    shelf = Store(tmp_path / "shelf")
    publish_random(shelf, tiny_llama, "fr", seed=1)
    archive = tar(shelf.path("fr", 1))
    keys = keys_file(tmp_path, admin={"roles": ["admin", "infer"]})
    address = f"127.0.0.1:{free_port()}"
    settings = ServerSettings(model=tiny_llama, store=tmp_path / "store", keys=keys, control_address=address)
    routers = [build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url, {}))) for _ in range(2)]
    with serving(routers[0]) as url, httpx.Client(headers=ADMIN, timeout=60) as client:
        refused = client.post(f"{url}/v1/abilities", content=archive)
        assert refused.status_code == 404
        assert "control address" in refused.json()["error"]["message"]
        assert client.get(f"{url}/v1/abilities").json()["data"] == []
        control = f"http://{address}"
        assert client.post(f"{control}/v1/abilities", content=archive, headers={"authorization": "Bearer no"}).is_error
        assert client.post(f"{control}/v1/abilities", content=archive).status_code == 201
        assert client.get(f"{control}/v1/abilities/fr").json()["name"] == "fr"
        assert client.post(f"{control}/v1/chat/completions", json={}).status_code == 404
        answer = client.post(f"{url}/v1/chat/completions", json={"abilities": ["fr"], "messages": []})
        assert answer.headers["x-act-abilities"] == "fr@1*1"
        with serving(routers[1]):  # a second router of this machine shares the port
            assert client.get(f"{control}/v1/abilities").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{control}/health")


@pytest.mark.parametrize(
    "address", ["8001", "localhost", "a host:1", "http://127.0.0.1:8001", ":80", "127.0.0.1:99999"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ProfileError, match="control_address"):
        read_settings({"control_address": address})


@pytest.mark.parametrize("address", ["203.0.113.7:8001", "no-such-host.invalid:8001"])
def test_an_address_of_another_machine_stops_the_start(address: str) -> None:
    async def start() -> None:
        async with listening(FastAPI(), address):
            pass

    with pytest.raises(ProfileError, match=r"cannot listen there.*give an address of this machine"):
        asyncio.run(start())


def test_a_server_that_ends_before_it_listens_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = socket.socket()
    closed.close()
    monkeypatch.setattr(control_listener, "_bound", lambda _: closed)

    async def start() -> None:
        async with listening(FastAPI(), "127.0.0.1:8001"):
            pass

    with pytest.raises(ProfileError, match=r"127.0.0.1:8001: its HTTP server ended before it listened"):
        asyncio.run(start())
