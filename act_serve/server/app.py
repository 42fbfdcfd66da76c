"""The router's HTTP app: abilities and state from here, everything else from the engines."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from act_serve import __version__
from act_serve.abilities.catalogue import Catalogue
from act_serve.abilities.language import identify_language
from act_serve.abilities.resolve import Policy
from act_serve.abilities.store import open_store
from act_serve.errors import ActServeError, MissingExtraError
from act_serve.server.admin import admin_routes, keep_swept, warm_up
from act_serve.server.catalogue_watch import CatalogueWatch
from act_serve.server.config import ServerSettings
from act_serve.server.control import control_routes
from act_serve.server.control_listener import listening
from act_serve.server.forward import Forwarder, open_session
from act_serve.server.http_errors import answer_error
from act_serve.server.inference import Inference
from act_serve.server.keys import Clock, Keys
from act_serve.server.metrics import RouterMetrics
from act_serve.server.observe import Observed
from act_serve.server.openapi import document
from act_serve.server.request_log import open_request_log
from act_serve.server.skill_watch import SkillWatch
from act_serve.server.upstream import Upstream

if TYPE_CHECKING:
    from act_serve.server.tracing import RequestTracer


def build_app(
    settings: ServerSettings,
    base_model: str,
    open_upstream: Callable[[], Upstream],
    clock: Clock = time.monotonic,
    named_in_front: bool = False,
) -> FastAPI:
    """The app of one router.

    Args:
        settings: of the server.
        base_model: the name that clients use for the base.
        open_upstream: gives the seam to the engines; called once, when the app starts.
        clock: of the keys' rate limits, in seconds.
        named_in_front: as in :class:`~act_serve.server.observe.Observed`.

    Raises:
        ProfileError: the keys file is wrong.
        MissingExtraError: traces are asked for, and OpenTelemetry is not installed.
    """
    store = open_store(settings.store)
    catalogue = Catalogue(store)
    watch = CatalogueWatch(catalogue, settings.catalogue_refresh_s, SkillWatch())
    policy = Policy(base_model, settings.default_abilities, settings.allow_negative_weights)
    metrics = RouterMetrics()
    keys = Keys(settings.keys, clock)
    open_request_log()
    tracer = _tracer(settings.otlp_endpoint)
    observed: dict[str, Any] = {"metrics": metrics, "log_format": settings.log_format, "tracer": tracer}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await watch.refresh()
        await asyncio.to_thread(identify_language, "warm up")
        await warm_up(keys)
        async with open_session() as session:
            upstream = open_upstream()
            metrics.waiting.set_function(lambda: upstream.waiting)
            forwarder = Forwarder(upstream, session, metrics)
            control = control_routes(catalogue, base_model, forwarder, metrics, keys, settings.metrics_need_key)
            app.include_router(control)
            address = settings.control_address
            app.include_router(admin_routes(settings, store, watch, keys, elsewhere=address is not None))
            app.mount("/", Inference(watch, policy, forwarder, metrics, settings.max_body_bytes, keys))
            period_s = settings.catalogue_refresh_s
            watching = asyncio.gather(watch.run(), keys.run(period_s), keep_swept(store, settings.drain_s))
            try:
                async with contextlib.AsyncExitStack() as stack:
                    if address is not None:
                        aside = _application(observed)
                        aside.include_router(control)
                        aside.include_router(admin_routes(settings, store, watch, keys))
                        await stack.enter_async_context(listening(aside, address))
                    yield
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
                if tracer is not None:
                    await asyncio.to_thread(tracer.close)

    app = _application({**observed, "named_in_front": named_in_front}, lifespan=lifespan)
    app.openapi = document(app)  # type: ignore[method-assign]
    return app


def _tracer(endpoint: str | None) -> RequestTracer | None:
    if endpoint is None:
        return None
    try:
        from act_serve.server.tracing import RequestTracer
    except ImportError as exc:
        raise MissingExtraError("opentelemetry", "otel") from exc
    return RequestTracer(endpoint)


def _application(observed: dict[str, Any], **options: Any) -> FastAPI:
    app = FastAPI(title="act-serve", version=__version__, **options)
    app.add_exception_handler(ActServeError, answer_error)
    app.add_middleware(Observed, **observed)
    return app
