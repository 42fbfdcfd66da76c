"""The router's hot path: any of vLLM's own endpoints, with the abilities resolved."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from act_serve.abilities.resolve import FIELDS, Policy, Resolution, resolve
from act_serve.engine.settings import MODEL_HEADER
from act_serve.errors import PermissionDeniedError, UnknownAbilityError
from act_serve.server.answer_meter import AnswerMeter
from act_serve.server.catalogue_watch import CatalogueWatch
from act_serve.server.forward import Exchange, Forwarder
from act_serve.server.http_errors import send_error
from act_serve.server.keys import SECRET_HEADERS, Key, Keys
from act_serve.server.metrics import RouterMetrics
from act_serve.server.paths import check_path
from act_serve.server.request_body import ClientGoneError, is_json, parse_body, read_body
from act_serve.server.request_record import RequestRecord, recognized, record_of
from act_serve.server.route import route_of

# Internal to the hop between router and engine, or read by vLLM as another choice of the model
# (vllm/entrypoints/serve/sagemaker): a client's own value must not get there.
_DROPPED = ("x-act-", "x-amzn-sagemaker-")


@dataclass(frozen=True, slots=True)
class Inference:
    """An ASGI app for everything that the engines answer."""

    catalogue: CatalogueWatch
    policy: Policy
    forwarder: Forwarder
    metrics: RouterMetrics
    max_body_bytes: int
    keys: Keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one HTTP request; errors before the first byte become OpenAI error objects."""
        if scope["type"] != "http":
            return
        started = _Started(send)
        record = record_of(scope)
        with self.metrics.in_flight.track_inprogress():
            try:
                exchange = await self._exchange(scope, receive)
                await _unless_gone(self.forwarder.forward(exchange, started), receive, started)
            except ClientGoneError:
                self.metrics.disconnects.inc()
                record.status = 499
            except Exception as exc:
                if started.already:
                    raise
                record.error = type(exc).__name__
                await send_error(send, exc)

    async def _exchange(self, scope: Scope, receive: Receive) -> Exchange:
        key = recognized(scope, self.keys, "infer")
        path = scope["raw_path"].decode("ascii")
        check_path(scope["path"])
        query = scope["query_string"].decode("ascii")
        target = f"{path}?{query}" if query else path
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = [(name, value) for name, value in headers if _passes(name.lower())]
        body = await read_body(receive, scope, self.max_body_bytes)
        if scope["method"] == "POST" and is_json(scope):
            return await self._resolved(parse_body(body), target, headers, key, record_of(scope))
        if body and key.abilities is not None:  # the engine reads the field model in there
            raise PermissionDeniedError("this API key is for certain abilities, so its requests must be JSON")
        return Exchange(scope["method"], target, headers, body or None)

    async def _resolved(
        self, body: dict[str, Any], target: str, headers: list[tuple[str, str]], key: Key, record: RequestRecord
    ) -> Exchange:
        resolution = await self._resolve(body, key)
        record.composition = resolution.composition.header()
        meter = AnswerMeter(self.metrics, [a.name for a in resolution.composition.abilities], record)
        for name in FIELDS:
            body.pop(name, None)
        body["model"] = resolution.model(self.policy.base_model)
        headers = [(name, value) for name, value in headers if name != "content-type"]
        headers.append(("content-type", "application/json"))
        if resolution.composition:
            headers.append((MODEL_HEADER, body["model"]))
        return Exchange(
            "POST",
            target,
            headers,
            json.dumps(body).encode(),
            json.dumps(resolution.report()).encode(),
            _answer_headers(resolution),
            meter,
            route_of(resolution.composition, body),
        )

    def _resolve_now(self, body: dict[str, Any], key: Key) -> Resolution:
        view, skills = self.catalogue.view, self.catalogue.skills
        return resolve(body, view=view, policy=self.policy, skills=skills, allowed=key.abilities)

    async def _resolve(self, body: dict[str, Any], key: Key) -> Resolution:
        start = time.perf_counter()
        try:
            resolution = self._resolve_now(body, key)
        except UnknownAbilityError as exc:  # it may have been published a moment ago
            if exc.param == "model" or not await self.catalogue.look_again():
                raise
            resolution = self._resolve_now(body, key)
        self.metrics.decision.observe(time.perf_counter() - start)
        for ability in resolution.composition.abilities:
            self.metrics.abilities.labels(self.metrics.label(ability.name)).inc()
        if resolution.auto:
            for name in [a.name for a in resolution.composition.abilities] or ["none"]:
                self.metrics.auto.labels(self.metrics.label(name)).inc()
        return resolution


def _answer_headers(resolution: Resolution) -> tuple[tuple[bytes, bytes], ...]:
    used = (b"x-act-abilities", resolution.composition.header().encode())
    if not resolution.auto:
        return (used,)
    return used, (b"x-act-reason", resolution.reason.encode("ascii", "replace"))


def _passes(header: str) -> bool:
    return header not in SECRET_HEADERS and not header.startswith(_DROPPED)


class _Started:
    """An ASGI send that remembers whether the answer has begun and ended."""

    __slots__ = ("_send", "already", "finished")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.already = False
        self.finished = False

    async def __call__(self, message: Any) -> None:
        self.already = True
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.finished = True


async def _unless_gone(work: Coroutine[Any, Any, None], receive: Receive, started: _Started) -> None:
    """Runs ``work`` to its end, or cancels it as soon as the client closes the connection."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not started.finished:
            raise ClientGoneError
        await task
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
