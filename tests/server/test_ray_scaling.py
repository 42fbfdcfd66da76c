"""Ray adds an engine under load and takes it away again, and changes settings while requests come in.

A fake engine stands in for vLLM.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest
from ray import serve

from act_serve.server.config import ServerSettings
from act_serve.server.ray_engine import ENGINE
from tests.abilities.manifests import publish
from tests.server.ray_application import APPLICATION, CHAT, deploy, running

pytestmark = pytest.mark.slow
WHOLE = "a whole answer"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    store = tmp_path_factory.mktemp("store")
    publish(store, "fr")
    return ServerSettings(
        store=store, engine_cpus=0, engine_max_replicas=2, target_ongoing_requests=2, look_back_s=10.5,
        upscale_delay_s=1, downscale_delay_s=1, engine_surge_percent=100, replica_wait_s=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def url(settings: ServerSettings) -> Iterator[str]:
    with running(settings) as address:
        yield address


async def test_one_engine_becomes_two_under_load_and_one_again(url: str) -> None:
    assert await asyncio.to_thread(_engines) == 1
    async with httpx.AsyncClient(timeout=None) as client:
        streams = [asyncio.create_task(_ask(client, url, "endless")) for _ in range(8)]
        await _until(2)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await _until(1)
        assert await _ask(client, url, "stream") == WHOLE


async def test_a_change_of_the_settings_fails_no_request(url: str, settings: ServerSettings) -> None:
    answers: list[str] = []
    async with httpx.AsyncClient(timeout=60) as client:

        async def ask_all_the_time(how: str) -> None:
            while not changed.done():
                answers.append(await _ask(client, url, how))

        before = await _process(client, url)
        changed = asyncio.create_task(
            asyncio.to_thread(deploy, settings.model_copy(update={"max_ongoing_requests": 48}))
        )
        await asyncio.gather(*(ask_all_the_time(how) for how in ("", "slow", "stream", "stream")))
        await changed
        assert await _process(client, url) != before
    assert len(answers) > 20
    assert set(answers) == {WHOLE}


async def _ask(client: httpx.AsyncClient, url: str, how: str) -> str:
    """WHOLE, or what came in its place."""
    text = ""
    try:
        async with client.stream("POST", url + CHAT, json={"fake": how, "abilities": ["fr"]}) as reply:
            async for part in reply.aiter_text():
                text += part
    except httpx.HTTPError as exc:
        return f"{exc!r} after {text!r}"
    whole = reply.status_code == 200 and (how != "stream" or text.endswith("[DONE]\n\n"))
    return WHOLE if whole else f"{reply.status_code}: {text!r}"


async def _process(client: httpx.AsyncClient, url: str) -> str:
    reply = await client.post(url + CHAT, json={"fake": "stream"})
    return str(reply.headers["x-process"])


def _engines() -> int:
    """Engines that run."""
    replicas = serve.status().applications[APPLICATION].deployments[ENGINE].replica_states
    return int(replicas.get("RUNNING", 0))


async def _until(number: int) -> None:
    deadline = time.monotonic() + 300
    while await asyncio.to_thread(_engines) != number:
        assert time.monotonic() < deadline, serve.status()
        await asyncio.sleep(0.5)
