"""One real server for the whole session: the embedded base and abilities of random rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from act_serve.abilities.store import Store
from act_serve.delta.manifest import MANIFEST_FILE, TENSORS_FILE, dump_manifest
from act_serve.models.loading import embedded_base
from tests.abilities_for_tests import publish_random
from tests.online.server_process import ServerProcess

BASE = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """``fr`` (a language), ``math`` (a skill), and two that the engine must refuse."""
    store = Store(tmp_path_factory.mktemp("store"))
    base = embedded_base()
    for seed, name in enumerate(("fr", "math", "flipped", "foreign")):
        publish_random(store, base, name, seed, share=0.02, scale=0.01)
    _describe(store, "fr", kind="language", languages=("fr",))
    _describe(store, "math", kind="skill")
    fingerprint = store.manifest("foreign").base_fingerprint
    _describe(store, "foreign", base_fingerprint=fingerprint.model_copy(update={"sample": "f" * 64}))
    _flip_a_bit(store.path("flipped", 1) / TENSORS_FILE)
    return store


@pytest.fixture(scope="session")
def server(store: Store) -> Iterator[ServerProcess]:
    # Random rows make the model ramble, where a schema lets it: in spaces and line breaks.
    terse = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
    # In float32 an answer is the same whatever batch it is in and whatever part of its prompt is cached.
    settings = ["dtype=float32", "max_model_len=1024", f"engine_args={json.dumps(terse)}"]
    running = ServerProcess("--store", str(store.root), *(w for s in settings for w in ("--set", s)))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def _describe(store: Store, name: str, **changes: Any) -> None:
    manifest = store.manifest(name).model_copy(update=changes)
    (store.path(name, 1) / MANIFEST_FILE).write_text(dump_manifest(manifest))


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
