"""What router and Ray Serve cost: streaming clients against bare vLLM and through ``act-serve serve``.

    python -m benchmarks.router_overhead [--rounds 5] [--json FILE]

Both servers are up at the same time, with the same plugin, and every round measures both in turn, so that noise of
the machine meets both alike. Ratios are medians over rounds. Times to first token are medians over all requests; few
clients ask several times in a round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from act_serve.models.loading import EMBEDDED_NAME, embedded_base
from tests.ports import free_port

SIDES = ("bare", "router")
_READY_TIMEOUT_S = 600
_END = b"data: [DONE]\n\n"
# vLLM's processes poll for a second after their last step (SpinCondition in vllm/distributed), both servers' workers on
# the same core: the other side's first tokens would wait for that.
_SETTLE_S = 2.0
_REQUESTS = 4  # of all clients together in a round, at least


async def stream(session: aiohttp.ClientSession, url: str, number: int, tokens: int) -> float:
    """One streamed completion of exactly ``tokens`` tokens; gives the seconds to its first event."""
    body = {
        "model": EMBEDDED_NAME,
        "prompt": f"{number} Once upon a time there was",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    start, first, tail = time.perf_counter(), 0.0, b""
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for chunk in reply.content.iter_any():
            first = first or time.perf_counter() - start
            tail = chunk
    if not tail.endswith(_END):
        raise SystemExit(f"{url} broke a stream off: {tail[-300:]!r}")
    return first


async def measure(url: str, clients: int, tokens: int) -> tuple[float, list[float]]:
    """Tokens per second of all clients together, and each request's time to first token in milliseconds."""
    turns, firsts = max(_REQUESTS // clients, 1), list[float]()
    await asyncio.sleep(_SETTLE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()
        for turn in range(turns):
            numbers = range(turn * clients, (turn + 1) * clients)
            firsts += await asyncio.gather(*(stream(session, url, number, tokens) for number in numbers))
        seconds = time.perf_counter() - start
    return len(firsts) * tokens / seconds, [first * 1e3 for first in firsts]


async def compare(urls: dict[str, str], rounds: int, clients: list[int], tokens: int) -> dict[str, dict[str, float]]:
    """Every case ``SIDE_CLIENTS``: tok/s, its ratio to bare, median time to first token and what was added to it."""
    rates: dict[tuple[str, int], list[float]] = {}
    firsts: dict[tuple[str, int], list[float]] = {}
    for round_number in range(rounds + 1):
        for count in clients:
            for side in SIDES if round_number % 2 else reversed(SIDES):
                rate, first = await measure(urls[side], count, tokens)
                if round_number:  # the first one warms both up
                    rates.setdefault((side, count), []).append(rate)
                    firsts.setdefault((side, count), []).extend(first)
    cases = {}
    for (side, count), values in sorted(rates.items(), key=lambda item: (item[0][1], item[0][0])):
        ratios = [value / bare for value, bare in zip(values, rates["bare", count], strict=True)]
        first = statistics.median(firsts[side, count])
        cases[f"{side}_{count}"] = {
            "tok_s": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ttft_ms": first,
            "added_ttft_ms": first - statistics.median(firsts["bare", count]),
        }
    return cases


def start(store: Path, ports: dict[str, int]) -> dict[str, subprocess.Popen[bytes]]:
    """Both servers' processes."""
    model = str(embedded_base())
    bare = [sys.executable, "-m", "benchmarks.bare_engine", model, EMBEDDED_NAME, str(store), str(ports["bare"])]
    main = "from act_serve.cli.main import main; main()"
    router = [sys.executable, "-c", main, "serve", "--port", str(ports["router"]), "--store", str(store)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return {"bare": subprocess.Popen(bare, **quiet), "router": subprocess.Popen(router, **quiet)}


async def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns when a completion is answered."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            await measure(url, 1, 1)
            return
        except aiohttp.ClientError:
            await asyncio.sleep(1)
    raise SystemExit(f"{url} does not start")


def show(cases: dict[str, dict[str, float]]) -> None:
    """The table."""
    print(f"{'case':12} {'tok/s':>8} {'ratio':>7} {'first token ms':>15} {'added ms':>9}")
    for name, case in cases.items():
        print(
            f"{name:12} {case['tok_s']:8.0f} {case['ratio']:7.3f} {case['ttft_ms']:15.1f} {case['added_ttft_ms']:9.1f}"
        )


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Starts both, compares, and ends both."""
    ports = {side: free_port() for side in SIDES}
    urls = {side: f"http://127.0.0.1:{port}" for side, port in ports.items()}
    with tempfile.TemporaryDirectory() as store:
        processes = start(Path(store), ports)
        try:
            for side in SIDES:
                await wait_until_ready(urls[side], processes[side])
            return {"cases": await compare(urls, options.rounds, options.clients, options.tokens)}
        finally:
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.wait(60)


def main() -> None:
    """Prints the table; writes it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    result = asyncio.run(run(options))
    show(result["cases"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
