"""How long a router takes to list a large store, and to look whether it has changed.

    python -m benchmarks.store_listing [--abilities 1000] [--requests 500] [--s3] [--json FILE]

The store has so many abilities with the manifest of the shipped ``fr``, 209 changed modules each. A router in a
process of its own answers ``GET /v1/abilities`` over HTTP on a port of this machine, one request after the other, while
it looks through the store every second as it always does. The times of its catalogue are measured without HTTP: the
first reading, and one that finds nothing new. ``--s3`` also does both with the store in moto's S3 on this machine
(needs the extra dev).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from act_serve.abilities.catalogue import Catalogue
from act_serve.abilities.store import Store, open_store
from act_serve.delta.manifest import MANIFEST_FILE, dump_manifest
from benchmarks.timing import milliseconds
from tests.ports import free_port

_SHIPPED = Path(__file__).parents[1] / "abilities"
_REFRESHES = 9
_READY_TIMEOUT_S = 300


def fill(store: Path, abilities: int) -> None:
    """Writes the manifests where the store looks for them; nothing here reads tensors."""
    manifest = Store(_SHIPPED).manifest("fr", 1)
    for number in range(abilities):
        folder = store / f"a{number:04}" / "1"
        folder.mkdir(parents=True)
        (folder / MANIFEST_FILE).write_text(dump_manifest(manifest.model_copy(update={"name": f"a{number:04}"})))


def serve(store: str, port: int) -> None:
    """A router's process; no engine is behind it."""
    import uvicorn

    from act_serve.server.app import build_app
    from act_serve.server.config import ServerSettings
    from act_serve.server.upstream import FixedUpstream, Replica

    nowhere = FixedUpstream(Replica("none", f"http://127.0.0.1:{port}", {}))
    app = build_app(ServerSettings(store=store), "base", lambda: nowhere)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its log: a line for each request
    uvicorn.run(app, port=port, log_level="error")


@contextlib.contextmanager
def router(store: str, abilities: int) -> Iterator[httpx.Client]:
    """A client of a router that has read the whole store."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(store, port))
    process.start()
    deadline = time.monotonic() + _READY_TIMEOUT_S
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if len(client.get("/v1/abilities").json()["data"]) == abilities:
                        break
                if time.monotonic() > deadline or not process.is_alive():
                    raise SystemExit(f"the router does not list {abilities} abilities")
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.join()


def measure(store: str, abilities: int, requests: int) -> dict[str, float]:
    """Percentiles of the listing, and the catalogue's times, in milliseconds; the listing's size in bytes."""
    catalogue = Catalogue(open_store(store))
    first = milliseconds(catalogue.refresh)
    again = statistics.median(milliseconds(catalogue.refresh) for _ in range(_REFRESHES))
    with router(store, abilities) as client:
        size = len(client.get("/v1/abilities").content)
        times = [milliseconds(lambda: client.get("/v1/abilities").raise_for_status()) for _ in range(requests)]
    cuts = statistics.quantiles(times, n=100)
    return {
        "list_p50_ms": round(cuts[49], 2), "list_p95_ms": round(cuts[94], 2), "list_max_ms": round(max(times), 2),
        "list_bytes": size, "first_reading_ms": round(first, 1), "refresh_ms": round(again, 2),
    }  # fmt: skip


def measure_s3(folder: Path, abilities: int, requests: int) -> dict[str, float]:
    """The same with the store in moto's S3; its time is part of the first reading and of every refresh."""
    from tests.abilities.object_stores import BUCKET, MotoServer, environment

    moto = MotoServer()
    try:
        with environment(moto.url), tempfile.TemporaryDirectory(prefix="act-serve-bench-") as home:
            os.environ["ACT_SERVE_HOME"] = home
            import fsspec

            fsspec.filesystem("s3").put(f"{folder}/", f"{BUCKET}/abilities/", recursive=True)
            return measure(f"s3://{BUCKET}/abilities", abilities, requests)
    finally:
        moto.stop()


def main() -> None:
    """Prints a line for each figure, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--abilities", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--s3", action="store_true", help="also with the store in moto's S3")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="act-serve-bench-") as folder:
        fill(Path(folder), options.abilities)
        found = {"folder": measure(folder, options.abilities, options.requests)}
        if options.s3:
            found["s3"] = measure_s3(Path(folder), options.abilities, options.requests)
    for where, figures in found.items():
        for name, value in figures.items():
            print(f"{where:8}{name:18}{value:12,.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
