"""The Ray Serve application: ``serve run act_serve.server.ray_app:app store=abilities`` or a config file.

Router deployment in front, Engine deployments behind; see deploy/serve-config.yaml.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from act_serve.abilities.location import absolute
from act_serve.server.config import ServerSettings, read_settings
from act_serve.server.model_source import check_default_abilities, model_source
from act_serve.server.ray_affinity import AffinityRouter
from act_serve.server.ray_engine import ENGINE, Engine
from act_serve.server.ray_router import router_class

# A router is busy with a request as long as its answer streams.
_ROUTER_ONGOING = 10_000
_HEALTH_PERIOD_S = 5.0
# Ray replaces a replica after three silences of this length in a row; requests that it holds end then.
_HEALTH_TIMEOUT_S = 10.0
# Routers choose by what replicas report this often. Where several routers fill the replicas, a request looks again
# after the backoff, which must be short: Ray's own half second would leave an engine that has become free without work.
_ROUTING = RequestRouterConfig(
    request_router_class=f"{AffinityRouter.__module__}.{AffinityRouter.__name__}",
    request_routing_stats_period_s=1.0,
    max_backoff_s=0.1,
)


def app(args: dict[str, Any]) -> Application:
    """Builds the application; ``args`` are the fields of :class:`~act_serve.server.config.ServerSettings`.

    Raises:
        ProfileError: an argument is unknown or wrong.
        ModelError: the model's folder holds no checkpoint.
    """
    settings = read_settings(args)
    folders = {name: folder.absolute() for name in ("model", "keys")
               if (folder := getattr(settings, name)) is not None}  # fmt: skip
    allowed = tuple(folder.absolute() for folder in settings.allowed_sources)
    settings = settings.model_copy(update={**folders, "store": absolute(settings.store), "allowed_sources": allowed})
    check_default_abilities(settings)
    folder, name = model_source(settings)
    engine = serve.deployment(Engine).options(name=ENGINE, **_engine_options(settings))
    router = serve.deployment(router_class(settings, name)).options(name="Router", **_router_options(settings))
    return router.bind(engine.bind(settings, folder, name))


def _engine_options(settings: ServerSettings) -> dict[str, Any]:
    resources = {"num_cpus": settings.engine_cpus, "num_gpus": settings.engine_gpus}
    return {
        **_number_of_engines(settings),
        "max_surge_percent": settings.engine_surge_percent,
        "graceful_shutdown_timeout_s": settings.engine_stop_s,
        "max_ongoing_requests": settings.ongoing_limit,
        "request_router_config": _ROUTING,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "ray_actor_options": resources,
    }


def _number_of_engines(settings: ServerSettings) -> dict[str, Any]:
    """Fixed, or as Ray Serve's autoscaling keeps it: https://docs.ray.io/en/latest/serve/autoscaling-guide.html"""
    if settings.engine_max_replicas is None:
        return {"num_replicas": settings.engine_replicas}
    scaling = {
        "min_replicas": settings.engine_replicas,
        "max_replicas": settings.engine_max_replicas,
        # Less than what an engine takes, because Ray does not see what routers hold back.
        "target_ongoing_requests": settings.target_ongoing_requests
        or min(settings.max_num_seqs, settings.ongoing_limit / 2),
        "look_back_period_s": settings.look_back_s,
        "upscale_delay_s": settings.upscale_delay_s,
        "downscale_delay_s": settings.downscale_delay_s,
    }
    return {"autoscaling_config": scaling}


def _router_options(settings: ServerSettings) -> dict[str, Any]:
    return {
        "num_replicas": settings.router_replicas,
        # A changed router takes over before the former one leaves, which has a stream for each request of an engine.
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": settings.engine_stop_s,
        "max_ongoing_requests": _ROUTER_ONGOING,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "ray_actor_options": {"num_cpus": settings.router_cpus},
    }
