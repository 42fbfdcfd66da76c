"""Random traffic over HTTP on an engine with room for fewer abilities than exist: every answer is the right one."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import PreTrainedModel

from act_serve.abilities.store import Store
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.settings import MODEL_HEADER, EngineSettings
from tests.abilities_for_tests import merged_model, pinned, publish_random
from tests.engine.conftest import settings_with_room
from tests.engine.test_families import make

pytestmark = pytest.mark.slow

ABILITIES, ROOM, VERSIONS = 6, 3, 3
CLIENTS, TURNS = 8, int(os.environ.get("ACT_SERVE_TEST_TURNS", "20"))
WEIGHTS = [-1.5, -0.5, 0.0, 0.25, 1.0, 2.5]
# Beginnings that fill several blocks of the KV cache, so that requests would find each other's there.
BEGINNINGS = [[(7 * i + 3 * j) % 250 + 5 for j in range(70)] for i in range(2)]


def publish(store: Store, base: Path, number: int, version: int = 1) -> None:
    """Publishes ``r<number>``; the first two change norms, too, which steps of compiled engines run uncompiled for."""
    kinds = ["norms"] if number < 2 else []
    publish_random(store, base, f"r{number}", 100 * version + number, version, share=0.1, scale=0.1, outside=kinds)


@dataclass
class Traffic:
    """What random clients ask of the engine, and what they were answered.

    Attributes:
        answers: by pinned composition, prompts and answers as token ids.
        left: number of streams that their client closed before the end.
    """

    http: httpx.AsyncClient
    store: Store
    base: Path
    draw: random.Random
    answers: dict[str, list[tuple[list[int], list[int]]]] = field(default_factory=lambda: defaultdict(list))
    left: int = 0
    versions: list[int] = field(default_factory=lambda: [1] * ABILITIES)

    def composition(self) -> str:
        """Any abilities that there is room for, of any version, with any weights; as text, pinned."""
        chosen = self.draw.sample(range(ABILITIES), self.draw.randint(0, ROOM))
        parts = [
            f"r{i}@{self.draw.choice([self.versions[i], self.draw.randint(1, self.versions[i])])}"
            f"*{self.draw.choice(WEIGHTS)}"
            for i in chosen
        ]
        return str(pinned(self.store, "+".join(parts)))

    def prompt(self) -> list[int]:
        """One of the common beginnings and up to 20 tokens more."""
        return self.draw.choice(BEGINNINGS) + [self.draw.randint(5, 255) for _ in range(self.draw.randint(1, 20))]

    def publish(self) -> None:
        """A new version of an ability that has fewer than the most."""
        behind = [i for i, version in enumerate(self.versions) if version < VERSIONS]
        if behind:
            i = self.draw.choice(behind)
            version = self.versions[i] + 1
            publish(self.store, self.base, i, version)
            self.versions[i] = version

    async def turn(self) -> None:
        """One request, a batch, or a stream that its client leaves; at times a new version is published before it."""
        if self.draw.random() < 0.1:
            self.publish()
        composition = self.composition()
        model = f"smol:{composition}" if composition else "smol"
        prompts = [self.prompt() for _ in range(self.draw.choice([1, 1, 1, 3]))]
        body: dict[str, Any] = {
            "model": model, "prompt": prompts, "max_tokens": self.draw.randint(1, 24), "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        headers = {MODEL_HEADER: model}
        if self.draw.random() < 0.2:
            body |= {"stream": True, "max_tokens": 150}
            events = self.draw.randint(0, 12)
            async with self.http.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
                assert reply.status_code == 200
                lines = reply.aiter_lines()
                for _ in range(events):  # fewer come where this client is so slow that tokens come together
                    assert "error" not in await anext(lines, "")
            self.left += 1
        else:
            reply = await self.http.post("/v1/completions", json=body, headers=headers)
            assert reply.status_code == 200, reply.text
            for choice in reply.json()["choices"]:
                self.answers[composition].append((prompts[choice["index"]], choice["token_ids"]))

    async def client(self) -> None:
        """One of the clients that are busy at the same time."""
        for _ in range(TURNS):
            await self.turn()


@asynccontextmanager
async def listening(settings: EngineSettings) -> AsyncIterator[tuple[Any, str]]:
    """The engine's app and its address; over a real socket, so that a client that leaves is seen as one."""
    import uvicorn

    from act_serve.engine.app import engine_app

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        async with engine_app(settings) as app:
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                yield app, f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                await serving


@torch.inference_mode()
def choices(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The model's logits at each position of the answer."""
    logits_TV: torch.Tensor = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits_TV


def check(model: PreTrainedModel, base: PreTrainedModel, answers: list[tuple[list[int], list[int]]]) -> int:
    """Every token is the choice of the merged checkpoint; returns how many answers the base would give, too."""
    as_base = 0
    for prompt, tokens in answers:
        logits_TV = choices(model, prompt, tokens)
        got_T = logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        # Two programs add in different order, which decides where two tokens are that close.
        assert (logits_TV.amax(-1) - got_T <= 1e-4 * logits_TV.std()).all(), (prompt, tokens)
        as_base += choices(base, prompt, tokens).argmax(-1).tolist() == tokens
    return as_base


@pytest.mark.parametrize(
    "options",
    [{}, {"enforce_eager": False, "engine_args": {"tensor_parallel_size": 2}}],
    ids=["eager", "two compiled workers"],
)
async def test_every_answer_is_the_merged_checkpoints(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not options.get("enforce_eager", True):
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    seed = int(os.environ.get("ACT_SERVE_TEST_SEED") or random.SystemRandom().randrange(10**6))
    print(f"\nACT_SERVE_TEST_SEED={seed}")
    base = make(tmp_path / "base", "llama", 2)
    store = Store(tmp_path / "store")
    for i in range(ABILITIES):
        publish(store, base, i)
    options = {**options, "engine_args": {"block_size": 32, **options.get("engine_args", {})}}
    settings = settings_with_room(base, store, ROOM, max_model_len=512, max_num_seqs=CLIENTS, **options)
    async with listening(settings) as (app, address), httpx.AsyncClient(base_url=address, timeout=300) as http:
        traffic = Traffic(http, store, base, random.Random(seed))
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(traffic.client())
        seats = app.state.compositions.seats
        assert seats.bytes <= seats.max_bytes
        # Clients that left hold nothing: abilities that fill all of the room find a seat.
        for first in (0, ROOM):
            text = "+".join(f"r{i}" for i in range(first, first + ROOM))
            model = f"smol:{pinned(store, text)}"
            body = {"model": model, "prompt": BEGINNINGS[0], "max_tokens": 1}
            assert (await http.post("/v1/completions", json=body, headers={MODEL_HEADER: model})).status_code == 200
        assert sum(seat.users for seat in seats._seats.values()) == 0
        compositions = app.state.compositions
        reports = await compositions._client.collective_rpc("load_abilities", args=([], []))
        assert len(reports) == options["engine_args"].get("tensor_parallel_size", 1)
        for *_, resident in reports:  # and the workers hold no more than that
            assert {AbilityKey(*key) for key in resident} == set(seats._seats) | compositions._leaving
        evictions = app.state.compositions.metrics.registry.get_sample_value("act_ability_evictions_total")
    bare, as_base = merged_model(base, store, ""), 0
    for composition, answers in traffic.answers.items():
        same = check(merged_model(base, store, composition), bare, answers)
        as_base += same if composition else 0
    total = sum(map(len, traffic.answers.values()))
    print(f"{total} answers of {len(traffic.answers)} compositions, {traffic.left} streams left by their clients, "
          f"{evictions:.0f} evictions")  # fmt: skip
    # Abilities must change what is said, or the comparison proves nothing.
    assert as_base < 0.2 * total
    assert traffic.left
    assert evictions > ABILITIES
    assert max(traffic.versions) > 1
