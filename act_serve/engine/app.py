"""vLLM's own OpenAI app on an engine with abilities."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from act_serve.abilities.location import absolute
from act_serve.abilities.store import open_store
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.fit import ModuleShape
from act_serve.engine.admission import Admission
from act_serve.engine.held import HELD_PATH
from act_serve.engine.log import share_log
from act_serve.engine.registry import CompositionRegistry
from act_serve.engine.settings import MODEL_HEADER, WORKER_CLS, EngineSettings
from act_serve.engine.worker import checkpoint_folder
from act_serve.errors import ActServeError, RequestError
from act_serve.models.loading import computing_dtype

# A client that leaves ends the app's part of its request at once, and the engine's a few turns of the loop later, when
# the generators of its answer are finalised: until then steps still need its abilities.
_GONE_S = 0.5


@asynccontextmanager
async def engine_app(settings: EngineSettings) -> AsyncIterator[FastAPI]:
    """vLLM's FastAPI app, its engine running; every route of vLLM's, unchanged, and ``HELD_PATH``.

    A request that carries the header ``x-act-model`` with the same value as its body's ``model`` has that
    composition checked and loaded first; what is wrong with it is answered as an OpenAI error object.
    """
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)  # vLLM reads a whole number
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command_line(settings))
    validate_parsed_serve_args(args)
    async with build_async_engine_client(args) as client:
        share_log()
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await init_app_state(client, app.state, args, tasks)
        bound_metrics(client)
        compositions = await _registry(client, app.state.openai_serving_models, settings)
        app.state.compositions = compositions
        app.add_api_route(f"{HELD_PATH}/{{name}}", _held, include_in_schema=False)
        await compositions.load_pinned()
        keeping = asyncio.create_task(compositions.keep_pinned())
        try:
            with compositions.metrics.shown():
                yield app
        finally:
            keeping.cancel()


async def _held(name: str, request: Request) -> list[dict[str, Any]]:
    """What this engine holds of an ability."""
    return [asdict(held) for held in request.app.state.compositions.held(name)]


def served_dtype(wanted: str) -> str:
    """The dtype that vLLM is asked for: ``auto`` must not mean bfloat16 where the CPU has to emulate it."""
    return "float32" if wanted == "auto" and computing_dtype() is torch.float32 else wanted


def command_line(settings: EngineSettings) -> list[str]:
    """The engine's settings as ``vllm serve`` would take them."""
    # Of a store at a URL the workers get the folder: vLLM prints its arguments, and URLs can hold secrets.
    store = str(open_store(absolute(settings.store)).root)
    options: dict[str, Any] = {
        "served_model_name": settings.served_model_name,
        "dtype": served_dtype(settings.dtype),
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "enforce_eager": settings.enforce_eager,
        "enable_lora": True,
        "max_loras": settings.max_num_seqs,
        "max_lora_rank": 8,
        "worker_cls": WORKER_CLS,
        "additional_config": {
            "act_serve": {
                "store": store,
                "max_resident_bytes": settings.max_resident_bytes,
                "abilities_per_request": settings.abilities_per_request,
            }
        },
        "middleware": f"{__name__}.{HoldComposition.__name__}",
        "disable_uvicorn_access_log": True,
        **settings.engine_args,
    }
    words = ["--model", settings.model]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return words


async def _registry(client: Any, models: Any, settings: EngineSettings) -> CompositionRegistry:
    (of_any_worker, *_) = await client.collective_rpc("ability_modules")
    modules = {name: ModuleShape(*shape) for name, shape in of_any_worker.items()}
    (most, *_) = await client.collective_rpc("abilities_per_request")
    fingerprint = fingerprint_model(checkpoint_folder(settings.model))
    store = open_store(absolute(settings.store))
    admission = Admission(store, fingerprint, modules, tensors=False, most_abilities=most)
    return CompositionRegistry(client, models, admission, [settings.served_model_name], settings.max_resident_bytes)


class LatestLabels:
    """A gauge that keeps only the series it was last given.

    vLLM labels ``vllm:lora_requests_info`` with the names of the running adapters; every new set of compositions would
    be a time series for ever (vllm/v1/metrics/loggers.py).
    """

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge

    def labels(self, **labels: str) -> Any:
        """As the gauge's, the only series from now on."""
        self._gauge.clear()
        return self._gauge.labels(**labels)


def bound_metrics(client: Any) -> None:
    """Keeps the number of vLLM's time series independent of the compositions that were ever used."""
    loggers = client.logger_manager.stat_loggers if client.logger_manager else []
    for stat_logger in loggers:
        if getattr(stat_logger, "gauge_lora_info", None) is not None:
            stat_logger.gauge_lora_info = LatestLabels(stat_logger.gauge_lora_info)


async def read_body(receive: Receive) -> tuple[dict[str, Any], Receive]:
    """Reads a request's body; returns it, empty where it is no JSON object, and what gives it once more."""
    messages: list[Message] = []
    while not messages or messages[-1].get("more_body"):
        messages.append(await receive())
    try:
        body = json.loads(b"".join(message.get("body", b"") for message in messages))
    except ValueError:
        body = None
    rest = iter(messages)

    async def again() -> Message:
        message = next(rest, None)
        return await receive() if message is None else message

    return body if isinstance(body, dict) else {}, again  # vLLM says what is wrong with it


def refuse_background(body: Mapping[str, Any]) -> None:
    """Refuses what is answered before it is computed: its abilities are held as long as the request runs.

    Raises:
        RequestError: the responses endpoint is to compute in the background.
    """
    if body.get("background"):
        raise RequestError("background is not available with abilities; leave it out", param="background")


def refuse_prompt_logprobs(body: Mapping[str, Any]) -> None:
    """Refuses log-probabilities of the prompt.

    vLLM computes their logits apart from the tokens' and does not tell a worker whose they are, so they would lack the
    composition's rows of lm_head.

    Raises:
        RequestError: the request asks for them.
    """
    fields = [part for part in (body, body.get("sampling_params")) if isinstance(part, dict)]
    prompt_logprobs = any(part.get("prompt_logprobs") is not None for part in fields)  # 0 and false ask for them, too
    if prompt_logprobs or any(part.get("echo") for part in fields):
        field = "prompt_logprobs" if prompt_logprobs else "echo"
        raise RequestError(
            f"{field} is not available with abilities that change lm_head, as this composition's do; leave it out, "
            "or choose other abilities",
            param=field,
        )


class _Client:
    """Sees whether a client left before its answer was complete: an app hears that it has left in any case."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._left = self._complete = False

    @property
    def gone(self) -> bool:
        return self._left and not self._complete

    async def receive(self) -> Message:
        message = await self._receive()
        self._left = self._left or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        await self._send(message)
        self._complete = message["type"] == "http.response.body" and not message.get("more_body")


class HoldComposition:
    """ASGI middleware that has a request's abilities resident while it runs; plain ASGI, so streams pass untouched.

    Args:
        app: vLLM's app, whose state holds the :class:`CompositionRegistry`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with an error object, or passes the request on."""
        model = Headers(scope=scope).get(MODEL_HEADER) if scope["type"] == "http" else None
        if model is not None:
            try:
                compositions = scope["app"].state.compositions
                changes_lm_head = await compositions.changes_lm_head(model)
                if changes_lm_head or (scope["path"] == "/v1/responses" and not compositions.is_base(model)):
                    body, receive = await read_body(receive)
                    refuse_background(body)
                    if changes_lm_head:
                        refuse_prompt_logprobs(body)
                client = _Client(receive, send)
                async with compositions.hold(model):
                    try:
                        await self._app(scope, client.receive, client.send)
                    finally:
                        if client.gone and not compositions.is_base(model):
                            await asyncio.sleep(_GONE_S)
            except ActServeError as exc:
                error = {"message": str(exc), "type": type(exc).__name__, "param": getattr(exc, "param", None)}
                response = JSONResponse({"error": {**error, "code": exc.http_status}}, exc.http_status)
                await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)
