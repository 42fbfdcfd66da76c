"""Processes are killed and the store is harmed under load: every request ends, and no answer is another's.

One server with two real engines for all faults; ``pytest -s`` shows what each fault cost, and how long it took to heal.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from act_serve.abilities.store import Store
from act_serve.delta.manifest import TENSORS_FILE
from tests.abilities_for_tests import merged_model, publish_random
from tests.engine.test_families import make
from tests.engine.test_random_traffic import BEGINNINGS, check
from tests.online.server_process import ServerProcess
from tests.server.chaos_traffic import ANSWERED, DISCONNECTED, ERROR_EVENT, NO_END, Ended, Traffic

pytestmark = pytest.mark.slow

ABILITIES, CLIENTS, TOKENS = 4, 16, 160
COMPOSITIONS = [
    *("", "r0", "r1", "r2", "r3", "r0+r1", "r2*0.5", "r3*1.5", "r0*2.5", "r1*0.5+r3", "r2+r3", "r0+r1+r2+r3"),
    *("r1*2", "r0*0.5+r2*1.5", "r3*2", "r1*1.5"),
]
PROMPTS = [(*beginning, 5 + i) for beginning in BEGINNINGS for i in range(4)]
ENGINE, ROUTER, CORE = "ray::ServeReplica:act-serve:Engine", "ray::ServeReplica:act-serve:Router", "VLLM::EngineCore"
Judge = Callable[[Iterable["Ended"]], None]
# How long a hang may take to be noticed, not what healing may take.
_HEALING_LIMIT_S = 400


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "base", "llama", 2)


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """``r0`` to ``r3`` for the clients, ``late`` and ``later`` that nobody has asked for yet."""
    store = Store(tmp_path_factory.mktemp("stores") / "store")
    for seed, name in enumerate([*(f"r{i}" for i in range(ABILITIES)), "late", "later"]):
        publish_random(store, base, name, seed, share=0.1, scale=0.1)
    return store


@pytest.fixture(scope="module")
def server(base: Path, store: Store) -> Iterator[ServerProcess]:
    settings = ["engine_replicas=2", "engine_cpus=0", "dtype=float32", "max_model_len=512"]
    words = (word for setting in settings for word in ("--set", setting))
    running = ServerProcess("--model", str(base), "--store", str(store.root), *words)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


@dataclass
class Chaos:
    """The server under traffic."""

    server: ServerProcess
    traffic: Traffic

    def process(self, title: str) -> psutil.Process:
        """One of the server's processes with that title."""
        return next(p for p in self.server.descendants() if " ".join(p.cmdline()).startswith(title))

    async def kill(self, title: str) -> None:
        """Ends such a process as the kernel does when memory runs out."""
        victim = self.process(title)
        victim.kill()
        await asyncio.to_thread(victim.wait)

    async def healthy(self) -> None:
        """Waits until both engines answer, and every client has been answered since."""
        busy_s, self.traffic.pause_s = self.traffic.pause_s, 1.0  # an engine that starts needs the processor, too
        while await self.alive() != 2:
            await asyncio.sleep(0.2)
        self.traffic.pause_s = busy_s
        await self.traffic.all_answered()

    async def alive(self) -> int:
        """How many engines answer; 0 where there is no router."""
        try:
            alive: int = (await self.traffic.http.get("/ready")).json()["alive"]
        except httpx.TransportError:
            return 0
        return alive

    async def retries(self) -> float:
        """Engines that failed before they answered, so that another one was asked."""
        page = (await self.traffic.http.get("/metrics")).text
        line = next(line for line in page.splitlines() if line.startswith("act_router_retries_total "))
        return float(line.split()[1])

    @asynccontextmanager
    async def fault(self, name: str) -> AsyncIterator[list[Ended]]:
        """Inside, something breaks and heals; afterwards the list has all requests that ended meanwhile."""
        start, start_s = len(self.traffic.ended), time.monotonic()
        ended: list[Ended] = []
        async with asyncio.timeout(_HEALING_LIMIT_S):
            yield ended
        ended += self.traffic.ended[start:]
        counts = Counter(("stream" if e.stream else "whole", e.how) for e in ended)
        shown = ", ".join(f"{n} {kind} {how}" for (kind, how), n in sorted(counts.items()))
        print(f"\n{name}: healed after {time.monotonic() - start_s:.1f} s; {shown}")
        assert [e for e in ended if e.how in NO_END] == []


@asynccontextmanager
async def traffic(server: ServerProcess) -> AsyncIterator[Chaos]:
    """All clients are being answered, until the context ends."""
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as http,
        asyncio.TaskGroup() as tasks,
    ):
        clients = Traffic(http, "base", COMPOSITIONS, PROMPTS, TOKENS)
        for number in range(CLIENTS):
            tasks.create_task(clients.client(number))
        chaos = Chaos(server, clients)
        try:
            async with asyncio.timeout(_HEALING_LIMIT_S):
                await chaos.healthy()
            yield chaos
        finally:
            clients.stopped = True


def ways(ended: Iterable[Ended]) -> set[str]:
    """How the requests ended."""
    return {e.how for e in ended}


@pytest.fixture(scope="module")
def judge(base: Path, store: Store) -> Callable[[Iterable[Ended]], None]:
    """Compares every token that came, those of broken streams too, with the merged checkpoint."""
    bare = merged_model(base, store, "")

    def compare(ended: Iterable[Ended]) -> None:
        answers = defaultdict(set)
        for e in ended:
            assert len(e.tokens) == TOKENS or e.how != ANSWERED, e
            if e.tokens:
                answers[e.composition].add((e.prompt, e.tokens))
        as_base = 0
        for composition, pairs in answers.items():
            same = check(merged_model(base, store, composition), bare, [(list(p), list(t)) for p, t in sorted(pairs)])
            as_base += same if composition else 0
        # Abilities must change what is said, or the comparison proves nothing.
        assert as_base < 0.2 * sum(map(len, answers.values()))

    return compare


async def test_an_engines_core_that_is_killed(server: ServerProcess, judge: Judge) -> None:
    async with traffic(server) as chaos:
        await dies(chaos, CORE, "an engine's core is killed")
    judge(chaos.traffic.ended)


async def test_an_engine_replica_that_is_killed(server: ServerProcess, judge: Judge) -> None:
    async with traffic(server) as chaos:
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
    async with traffic(server) as chaos:
        async with chaos.fault("the router is killed") as ended:
            await chaos.kill(ROUTER)
            await chaos.healthy()
        assert ways(ended) <= {ANSWERED, DISCONNECTED, "503"}
        assert DISCONNECTED in ways(ended)
    judge(chaos.traffic.ended)


async def test_an_artifact_that_is_damaged(server: ServerProcess, store: Store, judge: Judge) -> None:
    tensors = store.path("late", 1) / TENSORS_FILE
    whole = tensors.read_bytes()
    async with traffic(server) as chaos:
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
    async with traffic(server) as chaos:
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
