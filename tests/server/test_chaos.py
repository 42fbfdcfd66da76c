"""Processes are killed and the store is harmed under load: every request ends, and no answer is another's.

One server with two real engines for all faults; ``pytest -s`` shows what each fault cost, and how long it took to heal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest

from act_serve.abilities.store import Store
from act_serve.delta.manifest import TENSORS_FILE
from tests.engine.test_families import make
from tests.online.server_process import ServerProcess
from tests.server import chaos as chaos_module
from tests.server.chaos import PROMPTS, Chaos, publish_abilities, serving, under_fire, ways
from tests.server.chaos_traffic import ANSWERED, DISCONNECTED, ERROR_EVENT, Ended

pytestmark = pytest.mark.slow

ENGINE, ROUTER = "ray::ServeReplica:act-serve:Engine", "ray::ServeReplica:act-serve:Router"
CORE, WORKER = "VLLM::EngineCore", "VLLM::Worker"
Judge = Callable[[Iterable["Ended"]], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "base", "llama", 2)


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("stores") / "store")
    publish_abilities(store, base)
    return store


@pytest.fixture(scope="module")
def server(base: Path, store: Store) -> Iterator[ServerProcess]:
    with serving(base, store.root) as running:
        yield running


@pytest.fixture(scope="module")
def judge(base: Path, store: Store) -> Judge:
    return partial(chaos_module.judge, base=base, store=store)


@pytest.mark.parametrize("title", [CORE, WORKER])
async def test_a_process_of_an_engine_that_is_killed(server: ServerProcess, judge: Judge, title: str) -> None:
    async with under_fire(server) as chaos:
        await dies(chaos, title, f"{title} is killed")
    judge(chaos.traffic.ended)


async def test_an_engine_replica_that_is_killed(server: ServerProcess, judge: Judge) -> None:
    async with under_fire(server) as chaos:
        core = chaos.process(ENGINE).children(recursive=True)
        await dies(chaos, ENGINE, "an engine replica is killed")
        assert not any(process.is_running() for process in core), "its core must not keep the memory"
    judge(chaos.traffic.ended)


async def dies(chaos: Chaos, title: str, name: str) -> None:
    """While one engine lives, whole answers are given by it, and only streams that have begun are lost."""
    before = await chaos.retries()
    async with chaos.fault(name) as ended:
        await chaos.kill(title)
        while await chaos.alive() == 2:
            await asyncio.sleep(0.05)
        start_s = time.monotonic()
        await chaos.traffic.all_answered()
        print(f"\n{name}: one engine has answered all clients after {time.monotonic() - start_s:.1f} s more")
        await chaos.healthy()
    assert ways(e for e in ended if not e.stream) == {ANSWERED}
    assert ways(e for e in ended if e.stream) == {ANSWERED, ERROR_EVENT}
    assert all(e.tokens for e in ended if e.how == ERROR_EVENT), "a stream that has not begun is begun elsewhere"
    assert await chaos.retries() > before


async def test_a_router_that_is_killed(server: ServerProcess, judge: Judge) -> None:
    async with under_fire(server) as chaos:
        async with chaos.fault("the router is killed") as ended:
            await chaos.kill(ROUTER)
            await chaos.healthy()
        assert ways(ended) <= {ANSWERED, DISCONNECTED, "503"}
        assert DISCONNECTED in ways(ended)
    judge(chaos.traffic.ended)


async def test_an_artifact_that_is_damaged(server: ServerProcess, store: Store, judge: Judge) -> None:
    tensors = store.path("late", 1) / TENSORS_FILE
    whole = tensors.read_bytes()
    async with under_fire(server) as chaos:
        async with chaos.fault("an artifact is damaged") as ended:
            tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            for turn in range(8):
                refused = await chaos.traffic.ask("late", PROMPTS[0], stream=turn % 2 == 0)
                assert refused.how == "422", refused
            tensors.write_bytes(whole)
            answer = await chaos.traffic.ask("late", PROMPTS[0], stream=False)
            assert answer.how == ANSWERED, answer
        assert ways(ended) == {ANSWERED}
    judge([*chaos.traffic.ended, answer])


async def test_a_store_that_is_away(server: ServerProcess, store: Store, judge: Judge) -> None:
    away = store.root.with_name("away")
    async with under_fire(server) as chaos:
        async with chaos.fault("the store is away") as ended:
            store.root.rename(away)
            while "store_stale_s" not in (await chaos.traffic.http.get("/ready")).json():
                await asyncio.sleep(0.1)
            refused = [await chaos.traffic.ask("later", PROMPTS[0], stream=turn % 2 == 0) for turn in range(8)]
            await chaos.traffic.all_answered()
            away.rename(store.root)
            answer = await chaos.traffic.ask("later", PROMPTS[0], stream=False)
        assert ways(refused) == {"503"}, refused
        assert answer.how == ANSWERED, answer
        assert ways(ended) == {ANSWERED}, "what is resident needs no store"
    judge([*chaos.traffic.ended, answer])
