"""The router against a real Ray: replicas that are full, that die and that hang; a fake engine stands in for vLLM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from act_serve.server.config import ServerSettings
from tests.abilities.manifests import publish
from tests.server.ray_application import CHAT, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = tmp_path_factory.mktemp("store")
    publish(store, "fr")
    publish(store, "math")
    settings = ServerSettings(
        store=store, max_ongoing_requests=1, max_queued_requests=16, engine_replicas=2, engine_cpus=0, replica_wait_s=20
    )
    with running(settings) as address:
        yield address


def _ask(url: str, how: str) -> httpx.Response:
    return httpx.post(url + CHAT, json={"fake": how}, timeout=90)


def test_full_queues_are_answered_with_429_and_when_to_come_back(url: str) -> None:
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda _: _ask(url, "slow"), range(40)))
    statuses = [reply.status_code for reply in replies]
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert set(statuses) == {200, 429}, statuses
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "OverloadedError"
    assert _ask(url, "").status_code == 200


def test_a_hot_composition_does_not_hold_up_a_cold_one(url: str) -> None:
    _wait_for_two(url)
    ended: list[str] = []
    before = 0

    def ask(model: str) -> None:
        nonlocal before
        if model == "base":
            before = len(ended)
        reply = httpx.post(url + CHAT, json={"model": model, "fake": "slow"}, timeout=90)
        assert reply.status_code == 200, reply.text
        ended.append(model)

    with ThreadPoolExecutor(15) as pool:
        hot = [pool.submit(ask, "base:fr") for _ in range(14)]
        time.sleep(0.4)
        cold = pool.submit(ask, "base")
    for request in (*hot, cold):
        request.result()
    # Two that are being worked on and perhaps one more; the machine may be slow. In order of arrival it is twelve.
    assert ended.index("base") - before <= 6, (before, ended)


def test_an_ability_stays_where_it_is_loaded_until_that_is_busy(url: str) -> None:
    _wait_for_two(url)

    def process(model: str) -> int:
        reply = httpx.post(url + CHAT, json={"model": model, "fake": "stream"}, timeout=90)
        return int(reply.headers["x-process"])

    home = process("base:math")
    time.sleep(5.0)  # only what the engines report counts by now
    assert {process("base:math") for _ in range(8)} == {home}
    assert len({process("base") for _ in range(16)}) == 2, "the base is everywhere"
    with httpx.stream("POST", url + CHAT, json={"model": "base:math", "fake": "endless"}, timeout=90) as busy:
        assert int(busy.headers["x-process"]) == home
        assert process("base:math") != home


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
