"""The router against a real Ray: replicas that are full, that die and that hang; a fake engine stands in for vLLM."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from act_serve.server.config import ServerSettings
from tests.abilities.manifests import publish
from tests.ports import free_port

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"


def _application(settings: ServerSettings) -> Any:
    """As :func:`act_serve.server.ray_app.app`, with an engine that answers at once and says in which process it is."""
    from ray import serve

    from act_serve.server.lease import Leases
    from act_serve.server.ray_app import _engine_options, _router_options
    from act_serve.server.ray_engine import ENGINE, Engine
    from act_serve.server.ray_router import router_class
    from tests.server.fake_engine import FakeEngine

    class Stand(Engine):
        async def __init__(self) -> None:  # type: ignore[misc]
            self._token = secrets.token_urlsafe(24)
            fake = FakeEngine()
            healthy: Any = SimpleNamespace(check_health=fake.check_health)
            self._app = SimpleNamespace(state=SimpleNamespace(engine_client=healthy))
            self._leases = Leases(fake.app, self._token)
            self._exit = AsyncExitStack()
            await self._listen("127.0.0.1")

    engine = serve.deployment(Stand).options(name=ENGINE, **_engine_options(settings))
    router = serve.deployment(router_class(settings, "base")).options(name="Router", **_router_options(settings))
    return router.bind(engine.bind())


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import ray
    from ray import serve

    store = tmp_path_factory.mktemp("store")
    publish(store, "fr")
    settings = ServerSettings(
        store=store, max_ongoing_requests=1, max_queued_requests=1, engine_replicas=2, engine_cpus=0, replica_wait_s=20
    )
    folder = Path(tempfile.mkdtemp(prefix="as-"))  # short: Ray puts sockets in it
    port = free_port()
    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=str(folder), object_store_memory=80 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(_application(settings), name="act-serve")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _ask(url: str, how: str) -> httpx.Response:
    return httpx.post(url + CHAT, json={"fake": how}, timeout=90)


def test_full_queues_are_answered_with_429_and_when_to_come_back(url: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: _ask(url, "slow"), range(16)))
    statuses = [reply.status_code for reply in replies]
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert set(statuses) == {200, 429}, statuses
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "OverloadedError"
    assert _ask(url, "").status_code == 200


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_of_a_replica_that_ends_without_a_word(url: str, how: signal.Signals) -> None:
    """A stopped process keeps its connections open: only Ray's health check finds out, and ends it."""
    _wait_for_two(url)
    with httpx.stream("POST", url + CHAT, json={"fake": "endless"}, timeout=180) as reply:
        os.kill(int(reply.headers["x-process"]), how)
        ready = httpx.get(f"{url}/ready", timeout=30)
        assert ready.status_code == 200, "one replica that is silent or dead hides no living one"
        assert ready.json()["alive"] == 1
        text = "".join(reply.iter_text())
    assert '"code": 503' in text.splitlines()[-2 if text.endswith("\n\n") else -1], text[-300:]
    assert _ask(url, "stream").status_code == 200


def test_a_request_whose_replica_dies_before_the_first_byte_is_retried(url: str, tmp_path: Path) -> None:
    _wait_for_two(url)
    reply = httpx.post(url + CHAT, json={"fake": "kill one", "once": str(tmp_path / "killed")}, timeout=90)
    assert reply.status_code == 200, reply.text
    assert (tmp_path / "killed").exists()


def _wait_for_two(url: str) -> None:
    deadline = time.monotonic() + 120
    while httpx.get(f"{url}/ready", timeout=30).json()["alive"] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)
