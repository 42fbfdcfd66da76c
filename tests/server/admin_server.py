"""Two routers on one store with keys, and versions of abilities that lie elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from act_serve.abilities.desired_state import STATE_FILE
from act_serve.abilities.store import Store
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities_for_tests import publish_random
from tests.server.fake_engine import FakeEngine, serving

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
