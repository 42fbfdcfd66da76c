"""A server with real engines under traffic, to break things in, and a judge of how its requests end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from act_serve.abilities.store import Store
from tests.abilities_for_tests import merged_model, publish_random
from tests.engine.test_random_traffic import BEGINNINGS, check
from tests.online.server_process import ServerProcess
from tests.server.chaos_traffic import ANSWERED, NO_END, Ended, Traffic

# One per client, of abilities that are resident before anything breaks; `late` and `later` nobody has asked for yet.
# Each of two engines has so many of the clients that some of them stream and some wait for a whole answer.
COMPOSITIONS = [
    *("", "r0", "r1", "r2", "r3", "r0+r1", "r2*0.5", "r3*1.5", "r0*2.5", "r1*0.5+r3", "r2+r3", "r0+r1+r2+r3"),
    *("r1*2", "r0*0.5+r2*1.5", "r3*2", "r1*1.5", "r0*2", "r2*2", "r1+r2", "r0+r3*0.5", "r1*2.5", "r0+r2", "r1+r3"),
    "r2*1.5",
]
ABILITIES = ["r0", "r1", "r2", "r3", "late", "later"]
PROMPTS = [(*beginning, 5 + i) for beginning in BEGINNINGS for i in range(4)]
TOKENS = 160
# How long a hang may take to be noticed, not what healing may take.
_HEALING_LIMIT_S = 900


@dataclass
class Chaos:
    """The server with so many engines under traffic."""

    server: ServerProcess
    engines: int
    traffic: Traffic

    def process(self, title: str) -> psutil.Process:
        """One of the server's processes with that title."""
        return next(process for process in self.server.descendants() if _title(process).startswith(title))

    async def kill(self, title: str) -> None:
        """Ends such a process as the kernel does when memory runs out, while every stream runs."""
        victim = self.process(title)
        await self.traffic.all_streaming()  # requests come in waves: between two of them an engine has none to lose
        victim.kill()
        await asyncio.to_thread(victim.wait)

    async def healthy(self) -> None:
        """Waits until all engines answer, and every client has been answered since."""
        busy_s, self.traffic.pause_s = self.traffic.pause_s, 20.0  # an engine that starts needs the processor, too
        while await self.alive() != self.engines:
            await asyncio.sleep(1.0)
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


def publish_abilities(store: Store, base: Path) -> None:
    """All that the traffic and the tests ask for."""
    for seed, name in enumerate(ABILITIES):
        publish_random(store, base, name, seed, share=0.1, scale=0.1)


@contextmanager
def serving(base: Path, store: str | Path, engines: int = 2) -> Iterator[ServerProcess]:
    """A server of the store's abilities."""
    settings = [f"engine_replicas={engines}", "engine_cpus=0", "dtype=float32", "max_model_len=512"]
    words = (word for setting in settings for word in ("--set", setting))
    server = ServerProcess("--model", str(base), "--store", str(store), *words)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


@asynccontextmanager
async def under_fire(server: ServerProcess, engines: int = 2) -> AsyncIterator[Chaos]:
    """A client per composition is being answered, until the context ends."""
    async with httpx.AsyncClient(base_url=server.url, timeout=None) as http, asyncio.TaskGroup() as tasks:
        clients = Traffic(http, "base", COMPOSITIONS, PROMPTS, TOKENS)
        for number in range(len(COMPOSITIONS)):
            tasks.create_task(clients.client(number))
        chaos = Chaos(server, engines, clients)
        try:
            async with asyncio.timeout(_HEALING_LIMIT_S):
                await chaos.healthy()
            yield chaos
        finally:
            clients.stopped = True


def judge(ended: Iterable[Ended], base: Path, store: Store) -> None:
    """Every request has ended, and every token that came, of broken streams too, is the merged checkpoint's."""
    answers = defaultdict(set)
    for e in ended:
        assert e.how not in NO_END, e
        assert len(e.tokens) == TOKENS or e.how != ANSWERED, e
        if e.tokens:
            answers[e.composition].add((e.prompt, e.tokens))
    bare, as_base = merged_model(base, store, ""), 0
    for composition, pairs in answers.items():
        same = check(merged_model(base, store, composition), bare, [(list(p), list(t)) for p, t in sorted(pairs)])
        as_base += same if composition else 0
    # Abilities must change what is said, or the comparison proves nothing.
    assert as_base < 0.2 * sum(map(len, answers.values()))


def ways(ended: Iterable[Ended]) -> set[str]:
    """How the requests ended."""
    return {e.how for e in ended}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""
