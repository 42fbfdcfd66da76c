"""Routes that the router answers itself: models, abilities, health, metrics."""

from __future__ import annotations

import asyncio
from re import fullmatch
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from act_serve.abilities.allowed import check_allowed, visible
from act_serve.abilities.catalogue import Catalogue, CatalogueView, details, summary
from act_serve.delta.composition import NAME_PATTERN
from act_serve.engine.held import HELD_PATH
from act_serve.server.forward import Forwarder, fetch_text
from act_serve.server.keys import Key, Keys
from act_serve.server.metrics import RouterMetrics, merge_pages
from act_serve.server.replica_states import replica_rows
from act_serve.server.request_record import recognized

_PROBE_TIMEOUT_S = 2.0
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def control_routes(
    catalogue: Catalogue,
    base_model: str,
    forwarder: Forwarder,
    metrics: RouterMetrics,
    keys: Keys,
    metrics_need_key: bool,
) -> APIRouter:
    """The routes, on one router's parts; a key sees only the abilities that it may use."""
    routes = APIRouter()

    def view_of(request: Request) -> tuple[Key, CatalogueView]:
        key = recognized(request.scope, keys, None)
        return key, visible(catalogue.view, key.abilities)

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """This router is alive; says nothing about the engines."""
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """At least one engine answers: 200, else 503; ``store_stale_s`` says that the store cannot be read."""
        pages = await _ask_all(forwarder, "/health")
        alive = sum(page is not None for page in pages.values())
        body = {"status": "ready" if alive else "not ready", "replicas": len(pages), "alive": alive}
        body |= _staleness(catalogue)
        return JSONResponse(body, 200 if alive else 503)

    @routes.get("/metrics")
    async def metrics_page(request: Request) -> PlainTextResponse:
        """This router's metrics and those of all engine replicas, in Prometheus' text format."""
        if metrics_need_key:
            keys.check(request.headers, None)
        pages = await _ask_all(forwarder, "/metrics")
        metrics.store_stale.set(catalogue.stale_s or 0)
        engines = {name: page for name, page in pages.items() if page is not None}
        return PlainTextResponse(merge_pages(metrics.text(), engines), media_type=_METRICS_TYPE)

    @routes.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The base and every ability that is in order, in the shape of OpenAI's list."""
        _, view = view_of(request)
        return {"object": "list", "data": model_cards(view, base_model)}

    @routes.get("/v1/abilities")
    async def abilities(request: Request) -> JSONResponse:
        """Every ability of the store, damaged ones too; ``store_stale_s`` says that the list is from a cache."""
        _, view = view_of(request)
        data = [summary(entry) for entry in view.entries.values()]
        return JSONResponse({"object": "list", "data": data, **_staleness(catalogue)})

    @routes.get("/v1/abilities/{name}")
    async def ability(name: str, request: Request) -> JSONResponse:
        """One ability: the manifest and scores of its active version, and its versions' states in every engine."""
        key, view = view_of(request)
        check_allowed([name], key.abilities)
        known = view.entries.get(name)
        asked = known is not None or fullmatch(NAME_PATTERN, name)
        rows = replica_rows(known, await _ask_all(forwarder, f"{HELD_PATH}/{name}")) if asked else []
        if known is None and any(row.get("requests") for row in rows):
            return JSONResponse({"name": name, "object": "ability", "status": "removed", "replicas": rows})
        return JSONResponse({**details(view.ability(name)), "replicas": rows})

    return routes


def model_cards(view: CatalogueView, base_model: str) -> list[dict[str, Any]]:
    """OpenAI model objects; ``root`` and ``parent`` as vLLM gives them for adapters."""
    shared = {"object": "model", "created": 0, "owned_by": "act-serve"}
    base = {"id": base_model, **shared, "root": base_model, "parent": None}
    return [base] + [
        {"id": f"{base_model}:{m.name}", **shared, "root": f"{m.name}@{m.version}", "parent": base_model}
        for m in view.manifests()
    ]


def _staleness(catalogue: Catalogue) -> dict[str, Any]:
    """Nothing while the store can be read."""
    return {} if (seconds := catalogue.stale_s) is None else {"store_stale_s": round(seconds, 1)}


async def _ask_all(forwarder: Forwarder, path: str) -> dict[str, str | None]:
    replicas = await forwarder.upstream.replicas()
    pages = await asyncio.gather(
        *(fetch_text(forwarder.session, replica, path, _PROBE_TIMEOUT_S) for replica in replicas)
    )
    return {replica.name: page for replica, page in zip(replicas, pages, strict=True)}
