"""What loading an ability costs its own request, the others in flight, and the memory.

    python -m benchmarks.ability_loading [--rounds 200] [--json FILE] [--check]

Two engines are up at the same time: one with room for all 16 abilities of 5 % of the rows, one with room for 8.

- ``cold``: time to first token of a request whose ability must be loaded, beside that of the same request again, while
  other clients stream; and the gaps between those clients' tokens, with loads and without.
- ``turns``: 16 abilities in turn, median time to first token with room for 8 and with room for 16.
- ``memory``: growth of the engine's resident memory per loaded ability over its tensors in the served dtype; and
  growth over many rounds of loading and evicting.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from act_serve.cli.metrics_page import parse_metrics
from act_serve.models.loading import EMBEDDED_NAME, embedded_base
from benchmarks.router_overhead import free_port, wait_until_ready

ABILITIES, ROOM, SHARE, STREAMS = 16, 8, 0.05, 4
MOST = {
    "added_first_token_ms": 150.0,
    "gap_p99_over_median": 2.0,
    "ratio": 1.5,
    "bytes_per_tensor_byte": 1.1,
    "growth": 0.02,
}
SLACK = 1.15  # for the noise of a busy machine
MODEL_HEADER = "x-act-model"


async def ask(session: aiohttp.ClientSession, url: str, ability: str, tokens: int = 4) -> list[float]:
    """A streamed completion; gives when each event came, in seconds since the request."""
    model = f"{EMBEDDED_NAME}:{ability}" if ability else EMBEDDED_NAME
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    start = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body, headers={MODEL_HEADER: model}) as reply:
        reply.raise_for_status()
        return [time.perf_counter() - start async for _ in reply.content.iter_any()]


async def gaps(session: aiohttp.ClientSession, url: str, stop: asyncio.Event) -> list[float]:
    """Milliseconds between the tokens of a client that streams until ``stop``."""
    found = []
    while not stop.is_set():
        times = await ask(session, url, "", tokens=64)
        found += [(after - before) * 1e3 for before, after in itertools.pairwise(times)]
    return found


async def cold_loads(
    session: aiohttp.ClientSession, url: str, process: subprocess.Popen[bytes]
) -> tuple[dict[str, float], int]:
    """Loads every ability while others stream, then asks for each again.

    Returns:
        the figures, and the bytes by which memory grew with the loads beyond what it did with the same traffic later:
        tokens fill vLLM's cache, which lies in memory that no token has used before.
    """
    found, memory = {}, [resident(process)]
    firsts: dict[str, list[float]] = {"cold": [], "warm": []}
    for kind in firsts:
        stop = asyncio.Event()
        streams = [asyncio.create_task(gaps(session, url, stop)) for _ in range(STREAMS)]
        await asyncio.sleep(2)
        for number in range(1, ABILITIES):
            firsts[kind].append((await ask(session, url, f"a{number}"))[0] * 1e3)
            await asyncio.sleep(0.2)
        stop.set()
        between = sorted(gap for stream in await asyncio.gather(*streams) for gap in stream)
        memory.append(resident(process))
        found[f"{kind}_first_token_ms"] = statistics.median(firsts[kind])
        found[f"{kind}_gap_median_ms"] = statistics.median(between)
        found[f"{kind}_gap_p99_ms"] = between[int(0.99 * (len(between) - 1))]
    found["added_first_token_ms"] = found["cold_first_token_ms"] - found["warm_first_token_ms"]
    found["gap_p99_over_median"] = found["cold_gap_p99_ms"] / found["cold_gap_median_ms"]
    before, loaded, again = memory
    return found, (loaded - before) - (again - loaded)


async def turns(session: aiohttp.ClientSession, urls: dict[str, str]) -> dict[str, float]:
    """Rounds over all abilities, the engines in turn."""
    firsts: dict[str, list[float]] = {name: [] for name in urls}
    for round_number in range(4):
        for name, url in urls.items():
            for number in range(ABILITIES):
                first = (await ask(session, url, f"a{number}"))[0] * 1e3
                if round_number:
                    firsts[name].append(first)
    medians = {f"{name}_first_token_ms": statistics.median(values) for name, values in firsts.items()}
    return {**medians, "ratio": statistics.median(firsts["room_8"]) / statistics.median(firsts["room_16"])}


async def resident_abilities(session: aiohttp.ClientSession, url: str) -> int:
    """How many abilities the engine says it has."""
    async with session.get(f"{url}/metrics") as reply:
        return int(parse_metrics(await reply.text(), 0).sum("act_resident_abilities"))


def resident(process: subprocess.Popen[bytes]) -> int:
    """Bytes of memory of a process and its children."""
    whole = psutil.Process(process.pid)
    return sum(each.memory_info().rss for each in (whole, *whole.children(recursive=True)))


async def churn(session: aiohttp.ClientSession, url: str, process: subprocess.Popen[bytes], rounds: int) -> float:
    """Growth of memory, as a share of it, over so many loads that each evict another ability."""
    for number in range(2 * ABILITIES):
        await ask(session, url, f"a{number % ABILITIES}")
    before = resident(process)
    for number in range(rounds):
        await ask(session, url, f"a{number % ABILITIES}")
    return resident(process) / before - 1


async def run(rounds: int) -> dict[str, Any]:
    """Starts both engines, measures, and ends them."""
    from act_serve.abilities.store import Store
    from act_serve.models.loading import computing_dtype
    from tests.abilities_for_tests import publish_random

    base = embedded_base()
    with tempfile.TemporaryDirectory() as work:
        store, value_bytes = Store(Path(work)), computing_dtype().itemsize
        sizes = []
        for number in range(ABILITIES):
            publish_random(store, base, f"a{number}", seed=number, share=SHARE)
            counts = store.manifest(f"a{number}").counts
            sizes.append(counts.parameters * value_bytes + counts.channels * 4)  # as the engine keeps them
        ports = {"room_16": free_port(), "room_8": free_port()}
        budgets = {"room_16": (ABILITIES + 1) * sizes[0], "room_8": int((ROOM + 0.5) * sizes[0])}
        command = [sys.executable, "-m", "benchmarks.bare_engine", str(base), EMBEDDED_NAME, work]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes = {
            name: subprocess.Popen([*command, str(port), str(budgets[name])], **quiet) for name, port in ports.items()
        }
        urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        try:
            for name, url in urls.items():
                await wait_until_ready(url, processes[name])
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                # What a first load and streams take once is not what an ability takes.
                await asyncio.gather(*(ask(session, urls["room_16"], name, 64) for name in [""] * STREAMS + ["a0"]))
                cold, grown = await cold_loads(session, urls["room_16"], processes["room_16"])
                in_turn = await turns(session, urls)
                for name, room in (("room_16", ABILITIES), ("room_8", ROOM)):
                    found = await resident_abilities(session, urls[name])
                    if found != room:
                        raise SystemExit(f"the engine with room for {room} abilities has {found} resident")
                growth = await churn(session, urls["room_8"], processes["room_8"], rounds)
        finally:
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.wait(60)
    memory = {"bytes_per_tensor_byte": grown / sum(sizes[1:]), "growth": growth, "rounds": rounds}
    return {"resident_mib": sizes[0] / 2**20, "cold": cold, "turns": in_turn, "memory": memory}


def main() -> None:
    """Prints the figures; writes them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure is far above what it should be")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    cases = asyncio.run(run(options.rounds))
    over: list[str] = []
    for section, figures in cases.items():
        lines = figures.items() if isinstance(figures, dict) else [("", figures)]
        for name, value in lines:
            print(f"{section:12} {name:24} {value:10.3f}" + (f"   at most {MOST[name]:g}" if name in MOST else ""))
            over += [f"{name} {value:.3f}"] if value > SLACK * MOST.get(name, math.inf) else []
    if options.json:
        options.json.write_text(json.dumps({"cases": cases}, indent=2) + "\n")
    if options.check and over:
        sys.exit("too high: " + ", ".join(over))


if __name__ == "__main__":
    main()
