"""The application on a Ray of its own, with an engine that answers at once in the place of vLLM."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

from act_serve.server.config import ServerSettings
from tests.ports import free_port

CHAT = "/v1/chat/completions"
APPLICATION = "act-serve"


def application(settings: ServerSettings) -> Any:
    """As :func:`act_serve.server.ray_app.app`, with an engine that says in which process it is."""
    from ray import serve

    from act_serve.server.lease import Leases
    from act_serve.server.ray_app import _engine_options, _router_options
    from act_serve.server.ray_engine import ENGINE, RESIDENT, Engine
    from act_serve.server.ray_router import router_class
    from tests.server.fake_engine import FakeEngine

    class Stand(Engine):
        async def __init__(self) -> None:  # type: ignore[misc]
            self._token = secrets.token_urlsafe(24)
            fake = self._fake = FakeEngine()
            healthy: Any = SimpleNamespace(check_health=fake.check_health)
            self._app = SimpleNamespace(state=SimpleNamespace(engine_client=healthy))
            self._leases = Leases(fake.app, self._token)
            self._exit = AsyncExitStack()
            await self._listen("127.0.0.1")

        async def record_routing_stats(self) -> dict[str, list[str]]:
            return {RESIDENT: self._fake.resident()}

    engine = serve.deployment(Stand).options(name=ENGINE, **_engine_options(settings))
    router = serve.deployment(router_class(settings, "base")).options(name="Router", **_router_options(settings))
    return router.bind(engine.bind())


@contextmanager
def own_ray(cpus: int) -> Iterator[None]:
    """A Ray that ends with the context, and what runs on it with it."""
    import ray
    from ray import serve

    folder = tempfile.mkdtemp(prefix="as-")  # short: Ray puts sockets in it
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=folder, object_store_memory=80 << 20)
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(settings: ServerSettings) -> Iterator[str]:
    """The application's address; `deploy` again changes it."""
    from ray import serve

    port = free_port()
    with own_ray(cpus=2):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(settings)
        yield f"http://127.0.0.1:{port}"


def deploy(settings: ServerSettings) -> None:
    """Starts the application, or changes the running one as an edited serve config does, and waits until it runs."""
    from ray import serve

    serve.run(application(settings), name=APPLICATION)
