"""What an engine must refuse with a composition by what the body asks for, and that all else reaches vLLM whole."""

from __future__ import annotations

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

    @asynccontextmanager
    async def hold(self, model: str) -> AsyncIterator[None]:
        yield


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
