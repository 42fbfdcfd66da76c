"""The budget of resident abilities: never exceeded, never unfair, never stuck."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

import pytest
from prometheus_client import REGISTRY

from act_serve.engine.metrics import AbilityMetrics
from act_serve.engine.seats import Occupancy, Seats
from act_serve.errors import EngineError, RequestError


class Engine:
    """Counts what is resident, as the worker would."""

    def __init__(self, max_bytes: int) -> None:
        self.seats = Seats(max_bytes, self.evict)
        self.loads: list[str] = []
        self.evicted: list[str] = []

    async def evict(self, key: str) -> None:
        await asyncio.sleep(0)
        self.evicted.append(key)

    async def run(
        self, sizes: Mapping[str, int], until: asyncio.Event | None = None, fail: bool = False, hold_s: float = 0
    ) -> None:
        async def load() -> None:
            assert self.seats.bytes + sum(size for key, size in sizes.items() if key not in self.seats) <= (
                self.seats.max_bytes
            )
            await asyncio.sleep(0.001)
            if fail:
                raise EngineError("damaged")
            self.loads += [key for key in sizes if key not in self.seats]

        await self.seats.take(sizes, load)
        try:
            assert self.seats.bytes <= self.seats.max_bytes
            assert all(key in self.seats for key in sizes)
            await (until.wait() if until else asyncio.sleep(hold_s))
            assert all(key in self.seats for key in sizes)
        finally:
            self.seats.leave(sizes)


async def test_one_load_for_many_requests_that_wait() -> None:
    engine = Engine(10)
    await asyncio.gather(*(engine.run({"a": 4}) for _ in range(50)))
    assert engine.loads == ["a"]


async def test_resident_abilities_do_not_queue_behind_a_load() -> None:
    engine, busy = Engine(10), asyncio.Event()
    await engine.run({"r": 2})
    holder = asyncio.create_task(engine.run({"a": 6}, busy))
    await asyncio.sleep(0.01)
    waiter = asyncio.create_task(engine.run({"r": 2, "b": 8}))  # needs the room of a
    await asyncio.sleep(0.01)
    await asyncio.wait_for(engine.run({"r": 2}), 1)
    assert not waiter.done()
    busy.set()
    await asyncio.wait_for(asyncio.gather(holder, waiter), 1)
    assert engine.evicted == ["a"]


async def test_what_fits_beside_does_not_wait_for_others_to_leave() -> None:
    engine, busy = Engine(10), asyncio.Event()
    await engine.run({"idle": 3})
    holder = asyncio.create_task(engine.run({"a": 6}, busy))
    await asyncio.sleep(0.01)
    large = asyncio.create_task(engine.run({"large": 6}))  # waits for a, which leaves the other 4 for others
    await asyncio.sleep(0.01)
    await asyncio.wait_for(engine.run({"b": 1}), 1)
    await asyncio.wait_for(engine.run({"c": 4}), 1)  # in the place of those that nobody uses
    assert (engine.loads, engine.evicted) == (["idle", "a", "b", "c"], ["idle", "b"])
    five = asyncio.create_task(engine.run({"d": 5}))  # would take what `large` waits for
    again = asyncio.create_task(engine.run({"a": 6}))  # must leave first
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in (large, five, again))
    busy.set()
    await asyncio.wait_for(asyncio.gather(holder, large, five, again), 1)
    assert engine.loads[4] == "large"


async def test_room_that_comes_free_goes_to_whom_it_is_enough_for() -> None:
    engine, first, second = Engine(10), asyncio.Event(), asyncio.Event()
    holders = [asyncio.create_task(engine.run({"a": 6}, first)), asyncio.create_task(engine.run({"b": 4}, second))]
    await asyncio.sleep(0.01)
    large = asyncio.create_task(engine.run({"large": 5}))
    await asyncio.sleep(0.01)
    small = asyncio.create_task(engine.run({"small": 4}))
    await asyncio.sleep(0.01)
    assert engine.seats.occupancy()["a"].closing
    second.set()  # not what `large` waits for, as it came first
    await asyncio.wait_for(small, 1)
    assert not large.done()
    first.set()
    await asyncio.wait_for(asyncio.gather(large, *holders), 1)


async def test_a_steady_stream_cannot_starve_a_newcomer() -> None:
    engine = Engine(10)
    stop = asyncio.Event()

    async def stream() -> None:
        while not stop.is_set():
            await engine.run({"hot": 10})

    streams = [asyncio.create_task(stream()) for _ in range(4)]
    await asyncio.sleep(0.01)
    await asyncio.wait_for(engine.run({"cold": 10}), 1)
    stop.set()
    await asyncio.wait_for(asyncio.gather(*streams), 1)


async def test_the_first_takes_the_room_of_whatever_is_idle_first() -> None:
    """Those that came later must not be served by room that the first one could have had."""
    engine, long, short = Engine(10), asyncio.Event(), asyncio.Event()
    holders = [asyncio.create_task(engine.run({key: 5}, until)) for key, until in (("a", long), ("b", short))]
    await asyncio.sleep(0.01)
    first = asyncio.create_task(engine.run({"c": 5}, long))
    await asyncio.sleep(0.01)
    assert engine.seats.occupancy()["a"].closing
    later = [asyncio.create_task(engine.run({f"d{number}": 5})) for number in range(5)]
    again = asyncio.create_task(engine.run({"a": 5}, long))
    await asyncio.sleep(0.01)
    assert not again.done()
    short.set()
    await asyncio.sleep(0.05)
    assert engine.loads == ["a", "b", "c"]
    assert engine.evicted == ["b"]
    occupancy = engine.seats.occupancy()
    assert (occupancy["a"].users, occupancy["c"].users) == (2, 1), "who wants what stays after all is let in"
    long.set()
    await asyncio.wait_for(asyncio.gather(*holders, first, again, *later), 1)
    assert sorted(engine.loads[3:]) == [f"d{number}" for number in range(5)]


async def test_a_failed_load_fails_its_request_alone() -> None:
    engine = Engine(10)
    with pytest.raises(EngineError, match="damaged"):
        await engine.run({"bad": 4}, fail=True)
    assert "bad" not in engine.seats
    await asyncio.wait_for(engine.run({"good": 10}), 1)


async def test_a_failed_load_is_not_tried_again_by_those_that_wait_for_the_same() -> None:
    engine, loads = Engine(10), []

    async def fail() -> None:
        loads.append("a")
        await asyncio.sleep(0.01)
        raise EngineError("damaged")

    others = [asyncio.create_task(engine.run(sizes)) for sizes in ({"b": 2}, {"b": 2, "c": 2})]
    found = await asyncio.gather(*(engine.seats.take({"a": 4}, fail) for _ in range(50)), return_exceptions=True)
    assert [str(error) for error in found] == ["damaged"] * 50
    assert loads == ["a"]
    await asyncio.wait_for(asyncio.gather(*others), 1)
    await asyncio.wait_for(engine.run({"a": 4}), 1)  # who comes later tries again
    assert engine.loads[-1] == "a"
    assert not engine.seats.waiting


async def test_more_than_the_whole_budget_is_refused_at_once() -> None:
    engine = Engine(10)
    await engine.run({"a": 4})
    with pytest.raises(RequestError, match="raise max_resident_bytes"):
        await engine.run({"b": 6, "c": 6})
    assert "a" in engine.seats


async def test_a_client_that_stops_waiting_leaves_nothing_closed() -> None:
    engine, busy = Engine(10), asyncio.Event()
    holder = asyncio.create_task(engine.run({"a": 10}, busy))
    await asyncio.sleep(0.01)
    waiter = asyncio.create_task(engine.run({"b": 10}))
    await asyncio.sleep(0.01)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    await asyncio.wait_for(engine.run({"a": 10}), 1)  # joins while the holder still runs
    busy.set()
    await holder


@pytest.mark.parametrize("seed", range(5))
async def test_random_traffic_ends(seed: int) -> None:
    chance = random.Random(seed)
    engine = Engine(20)

    async def request() -> None:
        await asyncio.sleep(chance.random() * 0.02)
        await engine.run(
            {key: 2 + 2 * len(key) for key in chance.sample(["a", "bb", "ccc", "d", "ee"], chance.randint(1, 2))},
            hold_s=chance.choice([0, 0.003]),
        )

    requests = [asyncio.create_task(request()) for _ in range(100)]
    for task in chance.sample(requests, 20):
        task.cancel()
    results = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 20)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
    assert engine.seats.bytes <= 20


async def test_pinned_abilities_never_leave() -> None:
    engine = Engine(10)
    engine.seats.pinned = lambda keys: {"a"} & set(keys)
    for key in "abc":
        await engine.run({key: 3})
    await engine.run({"d": 3})
    await engine.run({"e": 6})
    assert engine.evicted == ["b", "c", "d"], "a is the least recently used one, and stays"
    with pytest.raises(RequestError, match="of that for 1 pinned ones; use fewer at once, unpin some, or raise"):
        await engine.run({"f": 8})
    await engine.run({"a": 3, "g": 7})
    assert engine.evicted[3:] == ["e"]


async def test_it_says_who_uses_and_who_waits_for_what() -> None:
    engine, busy = Engine(10), asyncio.Event()
    assert engine.seats.occupancy() == {}
    holder = asyncio.create_task(engine.run({"a": 6}, busy))
    await asyncio.sleep(0.01)
    waiters = [asyncio.create_task(engine.run({"b": 6})) for _ in range(2)]
    await asyncio.sleep(0.01)
    assert engine.seats.occupancy() == {"a": Occupancy(6, 1, 0, True), "b": Occupancy(0, 0, 2, False)}
    busy.set()
    await asyncio.gather(holder, *waiters)
    assert engine.seats.occupancy() == {"b": Occupancy(6, 0, 0, False)}
    await asyncio.gather(engine.run({"c": 6}, fail=True), return_exceptions=True)
    assert "c" not in engine.seats.occupancy()


async def test_the_metrics_show_what_is_resident_and_who_waits() -> None:
    engine, busy = Engine(10), asyncio.Event()
    page = AbilityMetrics(engine.seats).registry.get_sample_value
    holder = asyncio.create_task(engine.run({"a": 6}, busy))
    waiters = [asyncio.create_task(engine.run({"b": 4, "c": 6})) for _ in range(2)]
    await asyncio.sleep(0.01)
    assert (page("act_resident_abilities"), page("act_resident_bytes")) == (1, 6)
    assert (page("act_resident_bytes_limit"), page("act_compositions_waiting")) == (10, 2)
    waiters.pop().cancel()
    busy.set()
    await asyncio.wait_for(asyncio.gather(holder, *waiters), 1)
    assert (page("act_resident_abilities"), page("act_compositions_waiting")) == (2, 0)


def test_one_process_can_have_engines_one_after_another() -> None:
    for _ in range(2):
        with AbilityMetrics(Seats(10, Engine(10).evict)).shown():
            assert REGISTRY.get_sample_value("act_resident_bytes_limit") == 10
    assert REGISTRY.get_sample_value("act_resident_bytes_limit") is None
