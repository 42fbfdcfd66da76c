"""What a running router refuses to change, and that nothing of it is left."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from act_serve.delta.manifest import MANIFEST_FILE, TENSORS_FILE
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings, read_settings
from act_serve.server.upstream import FixedUpstream, Replica
from tests.server.admin_server import ADMIN, Server, tar, zipped
from tests.server.fake_engine import FakeEngine, serving

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
