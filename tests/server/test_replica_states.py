"""Where each engine replica stands with each version of an ability."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from act_serve.abilities.changes import activate, remove
from act_serve.abilities.store import Store
from act_serve.engine.held import Held
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.replica_states import State, state_of
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities.manifests import publish
from tests.server.fake_engine import FakeEngine, fake_engine, serving


@pytest.mark.parametrize(
    ("held", "active", "served", "state"),
    [
        (Held(2, "d"), 2, True, State.UNLOADED),
        (Held(2, "d", waiting=1), 2, True, State.LOADING),
        (Held(2, "d", resident_bytes=5), 2, True, State.READY),
        (Held(2, "d", requests=1, resident_bytes=5), 2, True, State.READY),
        (Held(2, "d", requests=1, resident_bytes=5, leaving=True), 2, True, State.DRAINING),
        (Held(2, "d", resident_bytes=5, leaving=True, waiting=1), 2, True, State.LOADING),
        (Held(1, "d", requests=1, resident_bytes=5), 2, True, State.DRAINING),
        (Held(1, "d", resident_bytes=5), 2, True, State.GONE),
        (Held(3, "d", requests=1, resident_bytes=5), 2, True, State.DRAINING),  # rolled back from
        (Held(3, "d", resident_bytes=5), 2, True, State.READY),
        (Held(3, "d"), 2, True, State.UNLOADED),
        (Held(2, "d", requests=1, resident_bytes=5), 2, False, State.DRAINING),  # of other content
        (Held(2, "d", resident_bytes=5), 2, False, State.GONE),
        (Held(1, "d", requests=1, resident_bytes=5), 0, False, State.DRAINING),
    ],
)
def test_the_state_of_a_version_on_a_replica(held: Held, active: int, served: bool, state: State) -> None:
    assert state_of(held, active, served) == state


class Several(FixedUpstream):
    def __init__(self, *replicas: Replica) -> None:
        super().__init__(replicas[0])
        self._all = replicas

    async def replicas(self) -> Sequence[Replica]:
        return self._all


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    with fake_engine() as first, fake_engine() as second:
        yield [first, second]


@pytest.fixture
def url(engines: list[FakeEngine], tmp_path: Path) -> Iterator[str]:
    replicas = [Replica(f"r{n}", engine.url) for n, engine in enumerate(engines)]
    replicas.append(Replica("r9", "http://127.0.0.1:9"))
    settings = ServerSettings(store=tmp_path, catalogue_refresh_s=0.05, drain_s=600)
    with serving(build_app(settings, "base", lambda: Several(*replicas))) as address:
        yield address


def states(url: str) -> dict[tuple[str, int], str]:
    rows = httpx.get(f"{url}/v1/abilities/fr").json().get("replicas", [])
    return {(row["replica"], row["version"]): row["state"] for row in rows}


def until(url: str, wanted: dict[tuple[str, int], str]) -> None:
    """Waits for the router's next look at the store."""
    for _ in range(600):
        found = states(url)
        if found.items() >= wanted.items():
            return
        time.sleep(0.02)
    raise AssertionError(found)


def test_a_version_is_followed_from_its_first_request_to_its_last(
    url: str, engines: list[FakeEngine], tmp_path: Path
) -> None:
    first = publish(tmp_path, "fr", 1).digest
    until(url, {("r0", 1): "UNLOADED", ("r1", 1): "UNLOADED", ("r9", 1): "UNREACHABLE"})
    engines[0].held = [Held(1, first, waiting=2)]
    until(url, {("r0", 1): "LOADING", ("r1", 1): "UNLOADED"})
    running = Held(1, first, requests=2, resident_bytes=7)
    engines[0].held = [running]
    until(url, {("r0", 1): "READY"})
    row = httpx.get(f"{url}/v1/abilities/fr").json()["replicas"][0]
    assert row == {"replica": "r0", "version": 1, "state": "READY", "requests": 2, "waiting": 0, "resident_bytes": 7}

    second = publish(tmp_path, "fr", 2).digest
    engines[1].held = [Held(2, second, resident_bytes=7)]
    until(url, {("r0", 1): "DRAINING", ("r0", 2): "UNLOADED", ("r1", 1): "GONE", ("r1", 2): "READY"})
    store = Store(tmp_path)
    activate(store, "fr", 1)
    until(url, {("r0", 1): "READY", ("r1", 2): "READY"})
    activate(store, "fr", 2)
    remove(store, "fr", 1)
    until(url, {("r0", 1): "DRAINING", ("r1", 1): "GONE"})
    remove(store, "fr")
    while "status" in (body := httpx.get(f"{url}/v1/abilities/fr").json()) and body["status"] != "removed":
        pass
    assert states(url)["r0", 1] == "DRAINING", "an ability that is removed is shown while a request uses it"
    engines[0].held = [Held(1, first, resident_bytes=7)]
    assert httpx.get(f"{url}/v1/abilities/fr").status_code == 404
    assert httpx.get(f"{url}/v1/abilities/..%2F").status_code == 404


def test_a_replica_that_hangs_holds_nobody_up_for_long(engines: list[FakeEngine], tmp_path: Path) -> None:
    publish(tmp_path, "fr")
    with serving(_Silent()) as silent:
        replicas = [Replica("r0", engines[0].url), Replica("r1", silent)]
        with serving(build_app(ServerSettings(store=tmp_path), "base", lambda: Several(*replicas))) as url:
            assert states(url) == {("r0", 1): "UNLOADED", ("r1", 1): "UNREACHABLE"}


class _Silent:
    """An app that takes requests and answers none."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"  # uvicorn takes that as: has no lifespan
        while (await receive())["type"] != "http.disconnect":
            pass


def test_the_command_line_prints_them(url: str, engines: list[FakeEngine], tmp_path: Path) -> None:
    digest = publish(tmp_path, "fr").digest
    engines[0].held = [Held(1, digest, requests=3, resident_bytes=7_000_000)]
    until(url, {("r0", 1): "READY"})

    def show(*words: str) -> subprocess.CompletedProcess[str]:
        program = "from act_serve.cli.main import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, "ability", "show", *words], capture_output=True, text=True
        )

    of_server = show("fr", "--url", url)
    assert of_server.returncode == 0, of_server.stderr
    for word in ("the ability fr", "READY", "7.0", "UNLOADED", "UNREACHABLE"):
        assert word in of_server.stdout
    assert "the ability fr" in show("fr", "--store", str(tmp_path)).stdout
    assert "replicas" in show("fr", "--url", url, "--json").stdout
    engines[0].held = []
    unknown = show("frr", "--url", url)
    assert (unknown.returncode, "did you mean 'fr'" in unknown.stderr) == (2, True)
