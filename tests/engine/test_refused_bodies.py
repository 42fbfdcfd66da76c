"""What an engine must refuse with a composition by what the body asks for, and that all else reaches vLLM whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from vllm.exceptions import VLLMValidationError

from act_serve.abilities.store import Store
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.engine import app as app_module
from act_serve.engine.admission import Admission
from act_serve.engine.app import HoldComposition
from act_serve.engine.resolver import AbilityResolver
from act_serve.engine.settings import MODEL_HEADER
from tests.abilities_for_tests import publish_random


class Compositions:
    """Stands for the engine's registry; `head` changes lm_head."""

    def is_base(self, model: str) -> bool:
        return ":" not in model

    async def changes_lm_head(self, model: str) -> bool:
        return model.endswith(":head")

    def __init__(self) -> None:
        self.held = False

    @asynccontextmanager
    async def hold(self, model: str) -> AsyncIterator[None]:
        self.held = True
        yield
        self.held = False


async def ask(model: str, body: bytes, *, pieces: int = 1, path: str = "/v1/completions") -> httpx.Response:
    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        await Response(await Request(scope, receive).body())(scope, receive, send)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = SimpleNamespace(state=SimpleNamespace(compositions=Compositions()))
        await HoldComposition(vllm)(scope, receive, send)

    async def streamed() -> AsyncIterator[bytes]:
        size = -(-len(body) // pieces)
        for start in range(0, len(body), size):
            yield body[start : start + size]

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
        return await http.post(path, content=streamed(), headers={MODEL_HEADER: model})


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("prompt_logprobs", {"prompt_logprobs": 0}),
        ("prompt_logprobs", {"sampling_params": {"prompt_logprobs": 3}}),
        ("echo", {"echo": True}),
    ],
)
async def test_prompt_logprobs_are_refused_with_lm_head_only(field: str, asked: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "hello", **asked}).encode()
    refused = await ask("smol:head", body, pieces=3)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == field
    assert "lm_head" in refused.json()["error"]["message"]
    passed = await ask("smol:other", body)
    assert (passed.status_code, passed.content) == (200, body)


async def test_what_is_computed_after_its_answer_is_refused_with_abilities_only() -> None:
    body = json.dumps({"input": "hello", "background": True}).encode()
    refused = await ask("smol:other", body, pieces=2, path="/v1/responses")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "background")
    for model, path in (("smol", "/v1/responses"), ("smol:other", "/v1/completions")):
        passed = await ask(model, body, path=path)
        assert (passed.status_code, passed.content) == (200, body)
    passed = await ask("smol:other", b'{"input": "hello"}', path="/v1/responses")
    assert passed.status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"not json", b"[1]", b'{"sampling_params": [], "echo": false, "prompt_logprobs": null, "logprobs": 2}', b"{}" * 5],
)
async def test_every_other_body_reaches_vllm_whole(body: bytes) -> None:
    passed = await ask("smol:head", body, pieces=2)
    assert (passed.status_code, passed.content) == (200, body)


async def test_abilities_stay_until_the_engine_knows_that_a_client_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_GONE_S", 0.2)
    compositions = Compositions()
    left = asyncio.Event()

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    messages = iter([{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    scope = {
        "type": "http", "path": "/v1/completions", "headers": [(MODEL_HEADER.encode(), b"smol:other")],
        "app": SimpleNamespace(state=SimpleNamespace(compositions=compositions)),
    }  # fmt: skip
    serving = asyncio.create_task(HoldComposition(vllm)(scope, receive, receive))
    await left.wait()
    await asyncio.sleep(0.05)
    assert compositions.held
    await asyncio.wait_for(serving, 5)
    assert not compositions.held


async def test_who_has_the_whole_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams hear that their client has left when all was sent, too; and the base needs nothing."""
    monkeypatch.setattr(app_module, "_GONE_S", 3600)

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        if scope["path"].endswith("completions"):
            await send({"type": "http.response.body", "body": b""})
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None: ...

    for model, path in (("smol:other", "/v1/completions"), ("smol", "/v1/broken")):
        scope = {
            "type": "http", "path": path, "headers": [(MODEL_HEADER.encode(), model.encode())],
            "app": SimpleNamespace(state=SimpleNamespace(compositions=Compositions())),
        }  # fmt: skip
        await asyncio.wait_for(HoldComposition(stream)(scope, receive, send), 10)


async def test_plain_vllm_serve_takes_no_ability_that_changes_lm_head(tmp_path: Any, tiny_llama: Any) -> None:
    store = Store(tmp_path)
    publish_random(store, tiny_llama, "head", seed=1, outside=True)
    publish_random(store, tiny_llama, "other", seed=1)
    admission = Admission(store, fingerprint_model(tiny_llama))
    for text in ("head", "head+other", "other"):
        assert admission.changes_lm_head(await admission.pin(Composition.parse(text))) == text.startswith("head")
    resolver = AbilityResolver(store)
    assert await resolver.resolve_lora(str(tiny_llama), f"{tiny_llama}:other") is not None
    with pytest.raises(VLLMValidationError, match="changes lm_head"):
        await resolver.resolve_lora(str(tiny_llama), f"{tiny_llama}:head")
