"""Mixed traffic against ``act-serve serve`` for a long time: does anything fail that should not, does memory grow?

    python -m benchmarks.soak [--minutes 30] [--clients 8] [--base FOLDER] [--json FILE]

Clients ask with several compositions, streaming and not, ask wrongly, list, and leave in the middle of a stream, while
an ability is added and removed again through the control plane. The engine has room for three of five abilities, so
that they are loaded and evicted all the time. Every few seconds the memory of routers and engines is taken (unique set
size: what would be free if the process ended). A line is fitted through it after a warm-up of a third of the time, of
ten minutes at most; growth is what that line rises by, relative to its start. Exit status 1 where it is over 5 % or a
request ended as it should not have.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.soak_traffic import Traffic, keys_file
from tests.online.server_process import ServerProcess

ABILITIES = 4  # and the guest
_ROOM = 3
_SAMPLE_S = 5.0
_WARM_UP_SHARE, _MAX_WARM_UP_S = 1 / 3, 600.0
_MAX_GROWTH = 0.05
# How Ray and vLLM name their processes.
_KINDS = {"Router": "router", "Engine": "engine", "VLLM": "engine"}

Samples = dict[str, list[tuple[float, int]]]


def prepare(work: Path, base: Path) -> int:
    """Writes the store's abilities; gives what the engine may hold, in bytes."""
    from act_serve.abilities.store import Store
    from act_serve.models.loading import computing_dtype
    from tests.abilities_for_tests import publish_random

    store = Store(work / "store")
    for number in range(ABILITIES):
        publish_random(store, base, f"a{number}", seed=number)
    return _ROOM * store.manifest("a0").counts.parameters * computing_dtype().itemsize * 21 // 20


def start(work: Path, base: Path) -> ServerProcess:
    """The server's process, and below it all others."""
    keys, room = keys_file(work / "keys.json"), prepare(work, base)
    settings = ("--set", f"max_resident_bytes={room}", "--set", "max_model_len=512")
    return ServerProcess("--store", str(work / "store"), "--model", str(base), "--keys", str(keys), *settings)


def memory(server: ServerProcess) -> dict[str, int]:
    """Bytes of the routers and of the engines, each with all that belongs to them."""
    found = dict.fromkeys(_KINDS.values(), 0)
    for process in server.descendants():
        with suppress(psutil.Error, IndexError):
            title = process.cmdline()[0]
            kind = next((kind for mark, kind in _KINDS.items() if mark in title), None)
            if kind is not None:
                found[kind] += process.memory_full_info().uss
    return found


async def watch(server: ServerProcess, samples: Samples) -> None:
    """Adds to the samples until it is cancelled."""
    begin = time.monotonic()
    while True:
        for kind, size in (await asyncio.to_thread(memory, server)).items():
            samples.setdefault(kind, []).append((time.monotonic() - begin, size))
        await asyncio.sleep(_SAMPLE_S)


def summarize(samples: Sequence[tuple[float, int]], warm_up_s: float) -> dict[str, float]:
    """Memory at the start and at the end in MiB, and its line after the warm-up."""
    times, sizes = zip(*((at, size / 2**20) for at, size in samples if at >= warm_up_s), strict=True)
    slope, intercept = statistics.linear_regression(times, sizes)
    at_first, at_last = (slope * at + intercept for at in (times[0], times[-1]))
    return {
        "start_mib": round(samples[0][1] / 2**20, 1), "warm_mib": round(at_first, 1), "end_mib": round(sizes[-1], 1),
        "mib_per_hour": round(slope * 3600, 2), "growth": round((at_last - at_first) / at_first, 4),
    }  # fmt: skip


async def soak(server: ServerProcess, base: Path, clients: int, seconds: float) -> tuple[Traffic, Samples]:
    """Runs the traffic."""
    traffic, samples = Traffic(server.url, base), {}
    watching = asyncio.create_task(watch(server, samples))
    await traffic.run(clients, time.monotonic() + seconds)
    watching.cancel()
    return traffic, samples


def report(traffic: Traffic, samples: Samples, seconds: float) -> dict[str, Any]:
    """Prints everything; gives it as what the JSON file holds."""
    warm_up_s = min(_WARM_UP_SHARE * seconds, _MAX_WARM_UP_S)
    sizes = {kind: summarize(taken, warm_up_s) for kind, taken in samples.items()}
    requests = traffic.expected.total() + traffic.unexpected.total()
    print(f"{requests} requests in {seconds / 60:.1f} minutes, {traffic.unexpected.total()} ended unexpectedly")
    for mark, counted in (("  ", traffic.expected), ("! ", traffic.unexpected)):
        for how, number in counted.most_common():
            print(f"{mark}{number:8} {how}")
    for kind, size in sizes.items():
        print(f"{kind}: {', '.join(f'{name} {value}' for name, value in size.items())}")
    outcomes = {"expected": dict(traffic.expected), "unexpected": dict(traffic.unexpected)}
    return {"minutes": seconds / 60, "requests": requests, **outcomes, "memory": sizes}


def main() -> None:
    """Runs it, and ends the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--base", type=Path, help="checkpoint folder; default: the embedded model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from act_serve.models.loading import embedded_base

    base, seconds = options.base or embedded_base(), options.minutes * 60
    with tempfile.TemporaryDirectory(prefix="act-serve-soak-") as work:
        server = start(Path(work), base)
        try:
            server.wait_until_ready()
            print("the server is ready", file=sys.stderr, flush=True)
            result = report(*asyncio.run(soak(server, base, options.clients, seconds)), seconds)
        finally:
            server.close()
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    grown = [kind for kind, size in result["memory"].items() if size["growth"] > _MAX_GROWTH]
    if grown or result["unexpected"]:
        sys.exit(f"failed: {sum(result['unexpected'].values())} unexpected ends; memory grows in: {grown or 'none'}")


if __name__ == "__main__":
    main()
