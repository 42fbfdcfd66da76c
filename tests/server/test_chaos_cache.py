"""A store in S3, and a disk for its cache that is full while clients are being answered."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from act_serve.abilities.store import Store, open_store
from act_serve.home import HOME_VARIABLE, cache_home
from tests.abilities.object_stores import BUCKET, MotoServer, environment
from tests.engine.test_families import make
from tests.server.chaos import PROMPTS, judge, publish_abilities, serving, under_fire, ways
from tests.server.chaos_traffic import ANSWERED

pytestmark = pytest.mark.slow

DISK_BYTES = 16 << 20


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of :data:`DISK_BYTES` in the folder."""
    folder.mkdir(parents=True)
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(mounting, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Writes a file that leaves no byte of its disk."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


async def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, shelf = make(tmp_path / "base", "llama", 2), Store(tmp_path / "shelf")
    publish_abilities(shelf, base)
    home, kernels = tmp_path / "home", cache_home() / "kernels"
    home.mkdir()
    kernels.mkdir(parents=True, exist_ok=True)
    (home / "kernels").symlink_to(kernels)  # they need not be compiled again
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    moto = MotoServer()
    try:
        with environment(moto.url):
            url = f"s3://{BUCKET}/chaos"
            store = open_store(url)
            assert store.mirror is not None
            for path in sorted(file for file in shelf.root.rglob("*") if file.is_file()):
                store.mirror.remote.upload(path, str(path.relative_to(shelf.root)))
            with small_disk(store.root), serving(base, url, engines=1) as server:
                async with under_fire(server, engines=1) as chaos:
                    async with chaos.fault("the cache's disk is full") as ended:
                        fill(store.root / "filler")
                        refused = [await chaos.traffic.ask("late", PROMPTS[0], stream=n % 2 == 0) for n in range(8)]
                        await chaos.traffic.all_answered()
                        (store.root / "filler").unlink()
                        answer = await chaos.traffic.ask("late", PROMPTS[0], stream=False)
                    assert ways(refused) == {"503"}, refused
                    assert all("No space left" in r.message for r in refused), refused
                    assert answer.how == ANSWERED, answer
                    assert ways(ended) == {ANSWERED}, "what is resident needs no disk"
                judge([*chaos.traffic.ended, answer], base, shelf)
    finally:
        moto.stop()
