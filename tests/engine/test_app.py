"""vLLM's app with abilities, in this process and through ASGI, with room for two abilities of four."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from act_serve.abilities.changes import pin
from act_serve.abilities.store import Store
from act_serve.cli.metrics_page import parse_metrics
from act_serve.delta.manifest import TENSORS_FILE
from act_serve.engine.held import HELD_PATH
from act_serve.engine.settings import MODEL_HEADER
from tests.abilities_for_tests import merged_model, pinned, publish_random
from tests.engine.conftest import settings_with_room

pytestmark = pytest.mark.slow
ROOM = 2
PROMPT = "The capital of France is"


@pytest.fixture
async def client(base: Path, tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Any, Store]]:
    from act_serve.engine.app import engine_app

    store = Store(tmp_path / "store")
    for number in range(4):
        publish_random(store, base, f"r{number}", seed=number)
    pin(store, "r3", True)
    async with engine_app(settings_with_room(base, store, ROOM, max_model_len=256, max_num_seqs=8)) as app:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=300) as http:
            yield http, app, store


async def complete(http: httpx.AsyncClient, store: Store, text: str) -> httpx.Response:
    model = f"smol:{pinned(store, text)}" if text else "smol"
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    return await http.post("/v1/completions", json=body, headers={MODEL_HEADER: model})


async def held(http: httpx.AsyncClient, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await http.get(f"{HELD_PATH}/{name}")).json()
    return rows


async def test_more_abilities_than_room(client: tuple[httpx.AsyncClient, Any, Store], base: Path) -> None:
    http, app, store = client
    ours = logging.getLogger("act_serve")
    assert ours.isEnabledFor(logging.WARNING), "vLLM's app sets the root logger to ERROR"
    assert ours.handlers
    assert set(ours.handlers) <= set(logging.getLogger("vllm").handlers)  # pytest adds more to vLLM's
    seats = app.state.compositions.seats
    assert [key.name for key in seats._seats] == ["r3"], "a pinned ability is there before the first request"
    texts = ["", "r0", "r1", "r2+r3*0.5", "r3", "r0*0.5+r3*2"] * 4
    replies = await asyncio.gather(*(complete(http, store, text) for text in texts))
    assert seats.bytes <= seats.max_bytes
    page = parse_metrics((await http.get("/metrics")).text, 0).sum
    assert 0 < page("act_resident_bytes") <= page("act_resident_bytes_limit") == seats.max_bytes
    assert page("act_ability_evictions_total") > 0
    assert page("act_ability_loads_total") == page("act_ability_evictions_total") + page("act_resident_abilities")
    assert page("act_ability_load_seconds_count") > ROOM
    prompt = AutoTokenizer.from_pretrained(base)(PROMPT)["input_ids"]
    answers = {}
    for text, reply in zip(texts, replies, strict=True):
        assert reply.status_code == 200, reply.text
        tokens = reply.json()["choices"][0]["token_ids"]
        assert answers.setdefault(text, tokens) == tokens
    for text, tokens in answers.items():
        with torch.inference_mode():
            logits = merged_model(base, store, text)(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens, text

    for text, reason in {"r1+r2+r3": "max_resident_bytes", "r0+r2": "of that for 1 pinned ones"}.items():
        too_many = await complete(http, store, text)
        assert too_many.status_code == 400
        assert reason in too_many.text

    damaged = store.path("r1", 1) / TENSORS_FILE
    publish_random(store, base, "r1", seed=9, version=2)
    (store.path("r1", 2) / TENSORS_FILE).write_bytes(damaged.read_bytes())
    refused = await complete(http, store, "r1")
    assert refused.status_code == 422
    assert "sha256" in refused.json()["error"]["message"]
    assert (await complete(http, store, "r1@1")).status_code == 200
    pin(store, "r1", True)  # its active version is the damaged one: logged, and nothing else suffers
    pin(store, "r0", True)
    pin(store, "r2", True)  # there is no room for it
    await app.state.compositions.load_pinned()
    assert {"r0", "r3"} == {key.name for key in seats._seats}
    running = asyncio.create_task(complete(http, store, "r0"))
    while not (rows := await held(http, "r0")) or not rows[0]["requests"]:
        assert not running.done()
        await asyncio.sleep(0.001)  # asking waits for nothing, so that nothing else would run
    assert rows[0]["resident_bytes"] == seats.max_bytes // ROOM - store.manifest("r0").counts.channels * 4
    await running
    assert [(row["version"], row["requests"]) for row in await held(http, "r0")] == [(1, 0)]
    assert await held(http, "r2") == []
    assert (await complete(http, store, "")).status_code == 200
