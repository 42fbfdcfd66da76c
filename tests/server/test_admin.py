"""Changing what a running router serves, over HTTP."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from act_serve.abilities.desired_state import STATE_FILE
from act_serve.abilities.store import Store
from act_serve.delta.manifest import MANIFEST_FILE, TENSORS_FILE
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings, read_settings
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities_for_tests import publish_random
from tests.server.fake_engine import FakeEngine, fake_engine, serving

CHAT = "/v1/chat/completions"
ADMIN = {"authorization": "Bearer the admin"}


def keys_file(folder: Path, **keys: dict[str, Any]) -> Path:
    entries = [{"id": name, "sha256": hashlib.sha256(f"the {name}".encode()).hexdigest(), **fields}
               for name, fields in keys.items()]  # fmt: skip
    path = folder / "keys.json"
    path.write_text(json.dumps(entries))
    return path


@dataclass
class Server:
    """A router, its store, and versions of abilities that lie elsewhere."""

    client: httpx.Client
    root: Path
    shelf: Store
    engine: FakeEngine
    second_router: httpx.Client

    def folder(self, name: str, version: int) -> Path:
        return self.shelf.path(name, version)

    def upload(self, name: str, version: int, query: str = "", **headers: str) -> httpx.Response:
        data = tar(self.folder(name, version))
        return self.client.post(f"/v1/abilities{query}", content=data, headers={**ADMIN, **headers})

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.client.post(path, json=body, headers=ADMIN)

    def used(self, name: str = "fr", client: httpx.Client | None = None) -> str:
        headers = {"authorization": "Bearer the user"}
        reply = (client or self.client).post(CHAT, json={"abilities": [name], "messages": []}, headers=headers)
        return reply.headers["x-act-abilities"] if reply.status_code == 200 else str(reply.status_code)

    def left(self) -> list[str]:
        there = os.listdir(self.root) if self.root.exists() else []
        return sorted(name for name in there if name not in (STATE_FILE, ".state.lock"))


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as running:
        yield running


@pytest.fixture(scope="module")
def shelf(tiny_llama: Path, tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tmp_path_factory.mktemp("shelf"))
    for version in (1, 2):
        publish_random(made, tiny_llama, "fr", version=version, seed=version)
    publish_random(made, tiny_llama, "math", seed=3)
    publish_random(made, tiny_qwen, "qwen", seed=4)
    return made


@pytest.fixture
def server(engine: FakeEngine, shelf: Store, tiny_llama: Path, tmp_path: Path) -> Iterator[Server]:
    keys = keys_file(
        tmp_path,
        admin={"roles": ["admin"]},
        user={"roles": ["infer"]},
        french={"roles": ["admin"], "abilities": ["fr"]},
    )
    root = tmp_path / "store"
    settings = ServerSettings(
        model=tiny_llama, store=root, keys=keys, catalogue_refresh_s=0.05, allowed_sources=(shelf.root,), drain_s=0.5,
        max_ability_bytes=1_000_000,
    )  # fmt: skip
    replica = Replica("r1", engine.url, {})
    apps = [build_app(settings, "base", lambda: FixedUpstream(replica)) for _ in range(2)]
    with (
        serving(apps[0]) as url,
        serving(apps[1]) as other,
        httpx.Client(base_url=url, timeout=60) as client,
        httpx.Client(base_url=other) as second,
    ):
        yield Server(client, root, shelf, engine, second)


def tar(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    return buffer.getvalue()


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    return buffer.getvalue()


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
    until(lambda: Store(server.root).names() == [])
    assert server.left() == ["fr"]
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


CALLS = [
    ("POST", "/v1/abilities"),
    ("DELETE", "/v1/abilities/fr"),
    ("DELETE", "/v1/abilities/fr/versions/1"),
    ("POST", "/v1/abilities/fr/activate"),
    ("POST", "/v1/abilities/fr/pin"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_only_admins_change_anything(server: Server, method: str, path: str) -> None:
    for key, status in ((None, 401), ("the user", 403), ("unknown", 401)):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        reply = server.client.request(method, path, content=b"{}", headers=headers)
        assert reply.status_code == status, reply.text
        assert "message" in reply.json()["error"]
    assert server.left() == []


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_without_an_admin_key_there_are_no_such_routes(
    engine: FakeEngine, tmp_path: Path, method: str, path: str
) -> None:
    settings = ServerSettings(store=tmp_path / "store")
    asked = len(engine.requests)
    with serving(build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url, {})))) as url:
        reply = httpx.request(method, f"{url}{path}", content=b"{}")
    assert reply.status_code == 404
    assert "role admin" in reply.json()["error"]["message"]
    assert len(engine.requests) == asked
    assert not (tmp_path / "store").exists()


def test_an_admin_of_some_abilities_changes_only_those(server: Server) -> None:
    french = {"authorization": "Bearer the french"}
    for name, status in (("math", 403), ("fr", 201)):
        data = tar(server.folder(name, 1))
        assert server.client.post("/v1/abilities", content=data, headers=french).status_code == status
        path = f"/v1/abilities/{name}/pin"
        assert server.client.post(path, json={}, headers=french).status_code == (200 if status == 201 else 403)
    reply = server.client.post("/v1/unload_lora_adapter", json={"lora_name": "math"}, headers=french)
    assert reply.status_code == 403
    assert server.left() == ["fr"]


def changed(folder: Path, into: Path, change: Any) -> bytes:
    shutil.copytree(folder, into)
    change(into)
    return zipped(into)


def test_bad_uploads_have_their_own_errors_and_leave_nothing(server: Server, tmp_path: Path) -> None:
    folder = server.folder("fr", 1)

    def flip(into: Path) -> None:
        data = bytearray((into / TENSORS_FILE).read_bytes())
        data[-1] ^= 1
        (into / TENSORS_FILE).write_bytes(data)

    def rename(into: Path) -> None:
        text = (into / MANIFEST_FILE).read_text()
        (into / MANIFEST_FILE).write_text(text.replace('"name": "fr"', '"name": "../fr"'))

    bad = [
        (changed(folder, tmp_path / "a", flip), 422, "sha256"),
        (changed(folder, tmp_path / "b", rename), 422, "name"),
        (changed(folder, tmp_path / "c", lambda into: (into / "x.pkl").write_bytes(b"")), 400, "is not one of"),
        (changed(folder, tmp_path / "d", lambda into: (into / TENSORS_FILE).unlink()), 400, f"no {TENSORS_FILE}"),
        (tar(server.folder("qwen", 1)), 409, "does not fit this base model"),
        (tar(folder)[:500], 400, "damaged"),
        (b"", 400, "neither a zip nor"),
        (bytes(2_000_000), 413, "larger than"),
        (iter([bytes(100_000)] * 20), 413, "larger than"),
    ]
    for data, status, message in bad:
        reply = server.client.post("/v1/abilities", content=data, headers=ADMIN)
        assert (reply.status_code, message in reply.text) == (status, True), reply.text
    assert server.client.post("/v1/abilities", files={"a": ("b", b"c")}, headers=ADMIN).status_code == 400
    assert server.client.post("/v1/abilities", data={"a": "b"}, files={}, headers=ADMIN).status_code == 400
    broken = {**ADMIN, "content-type": "multipart/form-data; boundary=x"}
    assert server.client.post("/v1/abilities", content=b"--y\r\n", headers=broken).status_code == 400
    no_boundary = {**ADMIN, "content-type": "multipart/form-data"}
    assert server.client.post("/v1/abilities", content=b"--y\r\n", headers=no_boundary).status_code == 400
    assert server.left() == []
    assert server.upload("fr", 1).status_code == 201


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/abilities", {"name": "fr"}, 400),
        ("/v1/abilities", {"name": "fr", "source": "http://127.0.0.1/x"}, 400),
        ("/v1/abilities", {"name": "fr", "source": "/etc/passwd"}, 400),
        ("/v1/abilities", {"name": "fr", "source": 1}, 400),
        ("/v1/abilities", [], 400),
        ("/v1/abilities", "x" * 100_000, 413),
        ("/v1/abilities/fr/activate", {"version": "1"}, 400),
        ("/v1/abilities/fr/activate", {"version": 0}, 400),
        ("/v1/abilities/fr/activate", {"version": 1, "more": 1}, 400),
        ("/v1/abilities/fr/activate", {"version": 10**30}, 404),
        ("/v1/abilities/FR%2F..%2F/activate", {"version": 1}, 403),
        ("/v1/abilities/Fr/activate", {"version": 1}, 400),
        ("/v1/abilities/fr/pin", {"pinned": 1}, 400),
        ("/v1/abilities/fr/pin", {}, 404),
        ("/v1/abilities?activate=maybe", None, 400),
    ],
)
def test_malformed_changes_are_refused(server: Server, path: str, body: Any, status: int) -> None:
    reply = server.client.post(path, headers=ADMIN) if body is None else server.post(path, body)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]
    assert server.left() == []


def test_a_version_that_is_no_number_is_unknown(server: Server) -> None:
    for version in ("x", "-1", "1e3", "9" * 5000):
        assert server.client.delete(f"/v1/abilities/fr/versions/{version}", headers=ADMIN).status_code == 404


def test_of_many_uploads_of_one_version_one_succeeds(server: Server) -> None:
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(server.upload("fr", 1).status_code)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] + [409] * 5
    assert server.left() == ["fr"]


def test_the_allowed_sources_as_serve_run_gives_them() -> None:
    assert read_settings({"allowed_sources": '["/a", "/b"]'}).allowed_sources == (Path("/a"), Path("/b"))
