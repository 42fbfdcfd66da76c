"""The soak benchmark counts what should not have been as such, and sees memory grow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from act_serve.abilities.store import Store
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.upstream import FixedUpstream, Replica
from benchmarks.soak import summarize
from benchmarks.soak_traffic import Traffic, keys_file
from tests.abilities_for_tests import publish_random
from tests.server.fake_engine import fake_engine, serving


def test_growth_is_measured_after_the_warm_up() -> None:
    starting = [(0.0, 50 << 20), (10.0, 90 << 20)]
    found = summarize([*starting, *((20.0 + 10 * n, (100 + n) << 20) for n in range(11))], warm_up_s=20)
    assert (found["start_mib"], found["warm_mib"], found["end_mib"]) == (50, 100, 110)
    assert found["growth"] == pytest.approx(0.1)
    assert found["mib_per_hour"] == pytest.approx(360)


async def test_answers_are_told_apart(tiny_llama: Path, tmp_path: Path) -> None:
    """The router's own answers are right; the fake engine's are no completions, and never errors."""
    for number in range(4):
        publish_random(Store(tmp_path / "store"), tiny_llama, f"a{number}", seed=number)
    settings = ServerSettings(model=tiny_llama, store=tmp_path / "store", keys=keys_file(tmp_path / "keys.json"))
    with fake_engine() as engine:
        app = build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url, {})))
        with serving(app) as url:
            traffic = Traffic(url, tiny_llama, guest_s=0.5)
            await traffic.run(4, time.monotonic() + 2)
    assert {"add: 201", "remove: 200", "wrong: 404", "list: 200", "disconnect: left"} <= traffic.expected.keys()
    assert {kind.partition(":")[0] for kind in traffic.unexpected} == {"answer", "stream", "wrong"}
    assert any(kind.startswith("wrong: 200 instead of 400") for kind in traffic.unexpected)
