"""Groups that wait take turns, and a full queue refuses those who have the most in it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from act_serve.errors import OverloadedError
from act_serve.server.fair_queue import FairQueue


@asynccontextmanager
async def place(queue: FairQueue, group: str) -> AsyncIterator[None]:
    await queue.enter(group)
    try:
        yield
    finally:
        queue.leave()


class Line:
    """A queue for one place, and the order in which it was given."""

    def __init__(self, max_waiting: int = 100) -> None:
        self.queue = FairQueue(max_waiting, places=1)
        self.order: list[str] = []
        self.go = asyncio.Event()

    def come(self, group: str) -> asyncio.Task[None]:
        return asyncio.create_task(self._come(group))

    async def _come(self, group: str) -> None:
        async with place(self.queue, group):
            self.order.append(group)
            await self.go.wait()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_cold_group_waits_for_one_turn_of_the_hot_one() -> None:
    line = Line()
    hot = [line.come("hot") for _ in range(50)]
    await settle()
    cold = line.come("cold")
    await settle()
    line.go.set()
    await asyncio.gather(*hot, cold)
    assert line.order.index("cold") == 2, "one was served already, and the next turn was the hot group's"


async def test_groups_take_turns_whatever_their_numbers() -> None:
    line = Line()
    first = line.come("x")
    await settle()
    waiting = [line.come(group) for group in "aaaaabbbc"]
    await settle()
    line.go.set()
    await asyncio.gather(first, *waiting)
    assert "".join(line.order) == "xabcababaa"


async def test_nobody_waits_where_there_are_places() -> None:
    queue = FairQueue(0, places=3)
    async with place(queue, "a"), place(queue, "a"), place(queue, "b"):
        with pytest.raises(OverloadedError):
            await queue.enter("c")
    async with place(queue, "a"), place(queue, "a"), place(queue, "b"):
        assert not queue.waiting


async def test_a_full_queue_refuses_the_group_that_has_the_most() -> None:
    line = Line(max_waiting=4)
    line.come("hot")
    await settle()
    hot = [line.come("hot") for _ in range(4)]
    await settle()
    with pytest.raises(OverloadedError):
        await line.come("hot")
    cold = [line.come("cold") for _ in range(2)]
    await settle()
    assert [task.done() for task in hot] == [False, False, True, True], "the newest of them made room"
    with pytest.raises(OverloadedError):
        await line.come("cold")  # they have equally many by now
    line.go.set()
    for refused in hot[2:]:
        with pytest.raises(OverloadedError):
            await refused
    await asyncio.gather(*hot[:2], *cold)
    assert not line.queue.waiting


@pytest.mark.parametrize("seed", range(20))
async def test_places_are_neither_lost_nor_doubled(seed: int) -> None:
    """Clients that come, end, give up while they wait, and give up in their turn."""
    draw, queue, inside, most = random.Random(seed), FairQueue(10, places=3), 0, 0

    async def come(group: str) -> None:
        nonlocal inside, most
        async with place(queue, group):
            inside += 1
            most = max(most, inside)
            try:
                await asyncio.sleep(draw.random() * 0.003)
            finally:
                inside -= 1

    tasks = []
    for _ in range(200):
        tasks.append(asyncio.create_task(come(draw.choice("aaab"))))
        if draw.random() < 0.3:
            draw.choice(tasks).cancel()
        await asyncio.sleep(draw.choice([0, 0, 0.001]))
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(e is None or isinstance(e, (OverloadedError, asyncio.CancelledError)) for e in ended)
    assert most == 3
    assert not queue.waiting
    async with place(queue, "a"), place(queue, "b"), place(queue, "c"):  # all three are there again
        assert inside == 0


async def test_who_gives_up_in_the_moment_of_its_turn_passes_it_on() -> None:
    line = Line()
    first, second, third = line.come("a"), line.come("b"), line.come("c")
    await settle()
    when: Callable[..., None] = lambda _: second.cancel()  # noqa: E731
    first.add_done_callback(when)
    line.go.set()
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert "c" in line.order


async def test_more_places_are_given_at_once_and_fewer_as_they_come_back() -> None:
    line = Line()
    tasks = [line.come("a") for _ in range(5)]
    await settle()
    line.queue.resize(3)
    await settle()
    assert len(line.order) == 3
    line.queue.resize(1)
    line.go.set()
    await asyncio.gather(*tasks)
    assert not line.queue.waiting
