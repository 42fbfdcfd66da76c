"""A server under traffic, to break things in."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import psutil

from tests.online.server_process import ServerProcess
from tests.server.chaos_traffic import Ended, Traffic

# How long a hang may take to be noticed, not what healing may take.
_HEALING_LIMIT_S = 900


@dataclass
class Chaos:
    """The server under traffic."""

    server: ServerProcess
    traffic: Traffic

    def process(self, title: str) -> psutil.Process:
        """One of the server's processes with that title."""
        return next(process for process in self.server.descendants() if _title(process).startswith(title))

    async def kill(self, title: str) -> None:
        """Ends such a process as the kernel does when memory runs out."""
        victim = self.process(title)
        victim.kill()
        await asyncio.to_thread(victim.wait)

    async def healthy(self) -> None:
        """Waits until both engines answer, and every client has been answered since."""
        busy_s, self.traffic.pause_s = self.traffic.pause_s, 5.0  # an engine that starts needs the processor, too
        while await self.alive() != 2:
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


@asynccontextmanager
async def under_traffic(
    server: ServerProcess, compositions: Sequence[str], prompts: Sequence[tuple[int, ...]], max_tokens: int
) -> AsyncIterator[Chaos]:
    """A client per composition is being answered, until the context ends."""
    async with httpx.AsyncClient(base_url=server.url, timeout=None) as http, asyncio.TaskGroup() as tasks:
        clients = Traffic(http, "base", compositions, prompts, max_tokens)
        for number in range(len(compositions)):
            tasks.create_task(clients.client(number))
        chaos = Chaos(server, clients)
        try:
            async with asyncio.timeout(_HEALING_LIMIT_S):
                await chaos.healthy()
            yield chaos
        finally:
            clients.stopped = True


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""
