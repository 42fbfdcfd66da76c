"""Routes that change what is served: add, remove, activate and pin abilities. Only for keys with the role admin."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from act_serve.abilities.allowed import check_allowed
from act_serve.abilities.archive import unpack
from act_serve.abilities.catalogue import summary
from act_serve.abilities.changes import activate, add, incoming, pin, remove, sweep
from act_serve.abilities.source import fetch
from act_serve.abilities.store import Store
from act_serve.delta.fingerprint import check_base, fingerprint_model
from act_serve.delta.manifest import Manifest, ModelFingerprint, read_manifest
from act_serve.errors import RequestError, StoreError, UnknownAbilityError
from act_serve.server.catalogue_watch import CatalogueWatch
from act_serve.server.config import ServerSettings
from act_serve.server.keys import Key, Keys
from act_serve.server.model_source import model_folder, model_source
from act_serve.server.paths import NoSuchPathError
from act_serve.server.request_body import parse_body, read_body
from act_serve.server.request_record import recognized
from act_serve.server.upload import uploaded

_log = logging.getLogger(__name__)
_MAX_JSON_BYTES = 65_536
_MAX_DIGITS = 9


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Source(_Body):
    name: str
    source: str
    activate: bool = False


class _Version(_Body):
    version: PositiveInt


class _Pinned(_Body):
    pinned: bool = True


class _LoadAdapter(_Body):
    lora_name: str
    lora_path: str


class _UnloadAdapter(_Body):
    lora_name: str
    lora_int_id: int | None = None


_B = TypeVar("_B", bound=_Body)


def admin_routes(
    settings: ServerSettings, store: Store, watch: CatalogueWatch, keys: Keys, *, elsewhere: bool = False
) -> APIRouter:
    """The routes, on one router's parts; `elsewhere`: they only say that another address has them.

    A change is durable in the store, and this router knows it, before the answer is sent; other routers know it
    within ``catalogue_refresh_s``.
    """
    routes = APIRouter()
    one_at_a_time = asyncio.Lock()
    fingerprint = cache(lambda: fingerprint_model(model_folder(model_source(settings)[0])))

    def admin(request: Request, *names: str) -> Key:
        if elsewhere:
            raise NoSuchPathError("abilities are changed at this server's control address, not at this one")
        if not keys.has_admin:
            raise NoSuchPathError(
                "this server changes nothing of what it serves until a key in its keys file has the role admin"
            )
        key = recognized(request.scope, keys, "admin")
        check_allowed(names, key.abilities)
        return key

    async def add_with(write: Callable[[Path], None], key: Key, **options: Any) -> dict[str, Any]:
        def work() -> Manifest:
            with incoming(store) as folder:
                write(folder)
                return add(store, folder, lambda staged: _verified(staged, key, fingerprint), **options)

        async with one_at_a_time:  # an artifact is read whole, and the router has other things to do
            manifest = await asyncio.to_thread(work)
        _log.info("key %s added ability %s@%d", key.id, manifest.name, manifest.version)
        return {**await shown(manifest.name), "added": manifest.version}

    async def shown(name: str) -> dict[str, Any]:
        await watch.refresh()
        entry = watch.view.entries.get(name)
        return {"name": name} if entry is None else summary(entry)

    def fetching(source: str) -> Callable[[Path], None]:
        return lambda folder: fetch(source, settings.allowed_sources, folder, settings.max_ability_bytes)

    @routes.post("/v1/abilities", status_code=201, openapi_extra=_documented(_Source, "application/zip"))
    async def add_ability(request: Request) -> JSONResponse:
        """Adds a version: an uploaded zip or tar.gz of its folder, or from a place under ``allowed_sources``."""
        key = admin(request)
        if request.headers.get("content-type", "").startswith("application/json"):
            body = await _read(request, _Source)
            added = await add_with(fetching(body.source), key, name=body.name, activate=body.activate)
            return JSONResponse(added, 201)
        wanted = request.query_params.get("activate", "false")
        if wanted not in ("true", "false"):
            raise RequestError("the query's activate must be true or false", param="activate")

        async with uploaded(request, store.root, settings.max_ability_bytes) as archive:
            added = await add_with(_unpacking(archive, settings.max_ability_bytes), key, activate=wanted == "true")
        return JSONResponse(added, 201)

    @routes.delete("/v1/abilities/{name}")
    async def remove_ability(name: str, request: Request) -> dict[str, Any]:
        """Serves an ability no more; requests in flight end as they began."""
        return await removed(name, None, admin(request, name))

    @routes.delete("/v1/abilities/{name}/versions/{version}")
    async def remove_version(name: str, version: str, request: Request) -> dict[str, Any]:
        """Serves a version no more; not the active one."""
        return await removed(name, _number(version), admin(request, name))

    async def removed(name: str, version: int | None, key: Key) -> dict[str, Any]:
        gone = await asyncio.to_thread(remove, store, name, version)
        _log.info("key %s removed ability %s, versions %s", key.id, name, gone)
        return {**await shown(name), "removed": gone}

    @routes.post("/v1/abilities/{name}/activate", openapi_extra=_documented(_Version))
    async def activate_version(name: str, request: Request) -> dict[str, Any]:
        """Serves a version to requests that name none; a lower one is a roll-back."""
        key = admin(request, name)
        version = (await _read(request, _Version)).version
        await asyncio.to_thread(activate, store, name, version)
        _log.info("key %s activated ability %s@%d", key.id, name, version)
        return await shown(name)

    @routes.post("/v1/abilities/{name}/pin", openapi_extra=_documented(_Pinned))
    async def pin_ability(name: str, request: Request) -> dict[str, Any]:
        """Keeps an ability resident in the engines as long as they can, or ends that."""
        key = admin(request, name)
        pinned = (await _read(request, _Pinned)).pinned
        await asyncio.to_thread(pin, store, name, pinned)
        _log.info("key %s %s ability %s", key.id, "pinned" if pinned else "unpinned", name)
        return await shown(name)

    @routes.post("/v1/load_lora_adapter", openapi_extra=_documented(_LoadAdapter))
    async def load_adapter(request: Request) -> PlainTextResponse:
        """As vLLM's: adds an ability from a path under ``allowed_sources``, and activates it."""
        key = admin(request)
        body = await _read(request, _LoadAdapter)
        await add_with(fetching(body.lora_path), key, name=body.lora_name, activate=True)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", openapi_extra=_documented(_UnloadAdapter))
    async def unload_adapter(request: Request) -> PlainTextResponse:
        """As vLLM's: removes an ability with all its versions."""
        key = admin(request)
        name = (await _read(request, _UnloadAdapter)).lora_name
        check_allowed([name], key.abilities)
        await removed(name, None, key)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return routes


async def warm_up(keys: Keys) -> None:
    """Loads what the first upload needs, which would hold up streams for seconds."""
    if keys.has_admin:
        await asyncio.to_thread(import_module, "act_serve.delta.artifact")


async def keep_swept(store: Store, drain_s: float) -> None:
    """Removes the files of versions that were removed from service ``drain_s`` ago, for ever."""
    while True:
        try:
            await asyncio.to_thread(sweep, store, drain_s)
        except (StoreError, OSError) as exc:
            _log.warning("the files of removed abilities stay for now: %s", exc)
        await asyncio.sleep(drain_s)


def _verified(folder: Path, key: Key, fingerprint: Callable[[], ModelFingerprint]) -> Manifest:
    from act_serve.delta.artifact import read_artifact

    manifest = read_manifest(folder, "the ability")
    what = f"ability {manifest.name}@{manifest.version}"
    check_allowed([manifest.name], key.abilities)
    check_base(manifest.base_fingerprint, fingerprint(), what=what)
    return read_artifact(folder, what)[0]


def _unpacking(archive: IO[bytes], max_bytes: int) -> Callable[[Path], None]:
    return lambda folder: unpack(archive, folder, max_bytes)


async def _read(request: Request, kind: type[_B]) -> _B:
    body = parse_body(await read_body(request.receive, request.scope, _MAX_JSON_BYTES))
    try:
        return kind.model_validate(body)
    except ValidationError as exc:
        first = exc.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(f"{where[:80]}: {first['msg']}", param=where[:80]) from None


def _number(version: str) -> int:
    if not (version.isascii() and version.isdecimal() and len(version) <= _MAX_DIGITS):
        raise UnknownAbilityError(f"{version[:20]!a} is not a version; versions are 1, 2, 3, ...", param="version")
    return int(version)


def _documented(body: type[_Body], *others: str) -> dict[str, Any]:
    """The request's body in the OpenAPI document; FastAPI's own reading of bodies would come before the key's check."""
    content: dict[str, Any] = {"application/json": {"schema": body.model_json_schema()}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in others}
    return {"requestBody": {"required": True, "content": content}}
