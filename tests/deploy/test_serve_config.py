"""A manifest's own serveConfigV2 on a Ray of this machine; only paths and the port in it are others."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from act_serve.abilities.store import Store
from tests.abilities_for_tests import publish_random
from tests.deploy.manifests import KUSTOMIZE, serve_config
from tests.ports import free_port
from tests.server.ray_application import APPLICATION, CHAT, own_ray
from tests.tiny_models import make_llama

pytestmark = pytest.mark.slow

# Generous: two slow cores import vLLM.
_START_TIMEOUT_S = 900


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    base, store = make_llama(tmp_path / "base", hidden=128), Store(tmp_path / "store")
    publish_random(store, base, "fr", seed=1)
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump([{"id": "a", "sha256": hashlib.sha256(b"k").hexdigest(), "roles": ["infer"]}]))
    read: dict[str, Any] = yaml.safe_load(serve_config(KUSTOMIZE / "overlays/cpu-demo"))
    read["http_options"]["port"] = free_port()
    (application,) = read["applications"]
    # The tiny model knows 512 positions.
    application["args"] |= {
        "model": str(base), "max_model_len": 256, "store": str(store.root), "keys": str(keys)
    }  # fmt: skip
    return read


@pytest.fixture
def url(config: dict[str, Any]) -> Iterator[str]:
    from ray import serve
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    with own_ray(cpus=2):  # as the Pod has them
        # What `serve deploy` and KubeRay have the dashboard do with the text.
        client = serve_start(http_options=config["http_options"], proxy_location=config["proxy_location"])
        client.deploy_apps(ServeDeploySchema.model_validate(config))
        deadline = time.monotonic() + _START_TIMEOUT_S
        while (status := serve.status().applications[APPLICATION]).status != "RUNNING":
            assert status.status not in ("DEPLOY_FAILED", "UNHEALTHY"), status
            assert time.monotonic() < deadline, status
            time.sleep(1)
        yield f"http://127.0.0.1:{config['http_options']['port']}"


def test_it_is_deployed_and_answers(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "abilities": ["fr"], "max_tokens": 4}
    assert httpx.get(f"{url}/ready", timeout=60).json()["alive"] == 1
    assert httpx.post(url + CHAT, json=body, timeout=60).status_code == 401
    reply = httpx.post(url + CHAT, json=body, headers={"x-api-key": "k"}, timeout=300)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-act-abilities"] == "fr@1*1"
    assert reply.json()["usage"]["completion_tokens"] >= 1
