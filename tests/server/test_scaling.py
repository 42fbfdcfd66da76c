"""The number of engines follows the load where the settings say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from act_serve.errors import ProfileError
from act_serve.server.config import read_settings
from act_serve.server.ray_app import app
from act_serve.server.ray_router import places_of_a_router


def engine_of(tiny_llama: Path, **args: Any) -> Any:
    """The Engine deployment that the application is built with."""
    router = app({"model": str(tiny_llama), **args})._bound_deployment
    return router.init_args[0]._bound_deployment


def scaling(deployment: Any) -> AutoscalingConfig | None:
    found: AutoscalingConfig | None = deployment._deployment_config.autoscaling_config
    return found


def test_by_default_the_number_is_fixed(tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama, engine_replicas=2)
    assert (engine.num_replicas, scaling(engine)) == (2, None)


def test_a_maximum_lets_it_follow_the_load(tiny_llama: Path) -> None:
    engine = engine_of(
        tiny_llama, engine_replicas=2, engine_max_replicas=6, look_back_s=20, upscale_delay_s=3, downscale_delay_s=60
    )
    made = scaling(engine)
    assert made is not None
    assert (made.min_replicas, made.max_replicas, made.target_ongoing_requests) == (2, 6, 16)
    assert (made.look_back_period_s, made.upscale_delay_s, made.downscale_delay_s) == (20, 3, 60)


def test_what_a_change_of_the_settings_replaces(tiny_llama: Path) -> None:
    router = app({"model": str(tiny_llama), "engine_surge_percent": 50, "engine_stop_s": 90})._bound_deployment
    engine = router.init_args[0]._bound_deployment
    configs = [deployment._deployment_config for deployment in (router, engine)]
    assert [config.max_surge_percent for config in configs] == [100, 50]
    assert [config.graceful_shutdown_timeout_s for config in configs] == [90, 90]


@pytest.mark.parametrize(
    ("args", "target"),
    [({"target_ongoing_requests": 5}, 5), ({"max_num_seqs": 40}, 40), ({"max_ongoing_requests": 4}, 2)],
)
def test_the_load_that_an_engine_should_have(tiny_llama: Path, args: dict[str, Any], target: float) -> None:
    made = scaling(engine_of(tiny_llama, engine_max_replicas=2, **args))
    assert made is not None
    assert made.target_ongoing_requests == target


@pytest.mark.parametrize(
    ("args", "at_an_engine", "of_a_router"),
    [({}, 32, 32), ({"max_num_seqs": 40}, 80, 80), ({"max_ongoing_requests": 5}, 5, 5),
     ({"router_replicas": 2}, 32, 24), ({"router_replicas": 8}, 32, 24),
     ({"router_replicas": 2, "max_ongoing_requests": 100}, 100, 58),
     ({"router_replicas": 2, "max_ongoing_requests": 7}, 7, 7)],
)  # fmt: skip
def test_the_requests_that_an_engine_takes(
    tiny_llama: Path, args: dict[str, Any], at_an_engine: int, of_a_router: int
) -> None:
    assert engine_of(tiny_llama, **args)._deployment_config.max_ongoing_requests == at_an_engine
    assert places_of_a_router(read_settings(args)) == of_a_router


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"engine_replicas": 3, "engine_max_replicas": 2}, "engine_max_replicas=2 is less than engine_replicas=3"),
        ({"target_ongoing_requests": 32}, "target_ongoing_requests=32 is never exceeded"),
    ],
)
def test_what_cannot_be_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        read_settings(args)
