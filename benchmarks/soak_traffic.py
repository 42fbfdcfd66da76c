"""What the clients of `benchmarks/soak.py` do: all that clients of a server do, over and over, and what is expected."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import io
import json
import random
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHAT = "/v1/chat/completions"
KEY = "soak"
HEADERS = {"authorization": f"Bearer {KEY}"}
GUEST = "guest"  # comes and goes
# "*" and "+" are the model field's own notation; "" is the base alone.
COMPOSITIONS = ("", "a0", "a1", "a0*0.5+a1", "a2+a3*0.25", "a1+a2+a3", GUEST, f"{GUEST}+a0")
WRONG: tuple[tuple[Any, int], ...] = (
    ({"abilities": ["nobody"]}, 404),
    ({"abilities": [{"name": "a0", "weight": "much"}]}, 400),
    ({"abilities": ["a0"], "max_tokens": -1}, 400),
    ({"abilities": [], "messages": "none"}, 400),
    ("no object", 400),
)
_END = b"data: [DONE]\n\n"
_SHOWN = 120  # characters of an answer that was not expected
_TIMEOUT_S = 300.0


def keys_file(path: Path) -> Path:
    """A keys file that knows ``KEY``, which may do everything."""
    entry = {"id": KEY, "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "roles": ["admin", "infer"]}
    path.write_text(json.dumps([entry]))
    return path


@dataclass
class Traffic:
    """Clients of one server.

    Attributes:
        url: of the server.
        base: folder of its base checkpoint, for the ability that comes and goes.
        seed: of what is asked, and in which order.
        guest_s: how long that ability stays each time; it is away for a third of that.
        expected, unexpected: requests by kind and how they ended.
    """

    url: str
    base: Path
    seed: int = 0
    guest_s: float = 15.0
    expected: collections.Counter[str] = field(default_factory=collections.Counter)
    unexpected: collections.Counter[str] = field(default_factory=collections.Counter)

    async def run(self, clients: int, until: float) -> None:
        """Returns soon after ``until``, a time of `time.monotonic`."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(self.url, headers=HEADERS, timeout=timeout) as session:
            some = [self._client(session, random.Random(self.seed + number), until) for number in range(clients)]
            await asyncio.gather(self._guest(session, until), *some)

    async def _client(self, session: aiohttp.ClientSession, choices: random.Random, until: float) -> None:
        kinds: dict[str, Callable[[aiohttp.ClientSession, random.Random], Awaitable[str]]] = {
            "answer": _answer, "stream": _stream, "disconnect": _disconnect, "wrong": _wrong, "list": _list,
        }  # fmt: skip
        while time.monotonic() < until:
            (kind,) = choices.choices(list(kinds), weights=(4, 4, 1, 1, 1))
            await self._count(kind, kinds[kind](session, choices))

    async def _guest(self, session: aiohttp.ClientSession, until: float) -> None:
        """Adds an ability and removes it again; each time another version, because versions never change."""
        version = 0
        while time.monotonic() < until:
            version += 1
            archive = await asyncio.to_thread(_packed_guest, self.base, version)
            await self._count("add", _status(session.post("/v1/abilities", data=archive), 201))
            await asyncio.sleep(self.guest_s)
            await self._count("remove", _status(session.delete(f"/v1/abilities/{GUEST}"), 200))
            await asyncio.sleep(self.guest_s / 3)

    async def _count(self, kind: str, request: Awaitable[str]) -> None:
        try:
            self.expected[f"{kind}: {await request}"] += 1
        except Unexpected as exc:
            self.unexpected[f"{kind}: {exc}"] += 1
        except (aiohttp.ClientError, TimeoutError) as exc:
            self.unexpected[f"{kind}: {type(exc).__name__}"] += 1


class Unexpected(Exception):
    """An answer that should have been another one."""


def _body(choices: random.Random, **more: Any) -> tuple[dict[str, Any], str]:
    """A request, and its composition's text."""
    text = choices.choice(COMPOSITIONS)
    abilities = [
        {"name": name, "weight": float(weight or 1)}
        for name, _, weight in (part.partition("*") for part in text.split("+") if part)
    ]
    ask = f"Write {choices.randint(2, 9)} words about the number {choices.randint(1, 10_000)}."
    messages = [{"role": "user", "content": ask}]
    return {"messages": messages, "abilities": abilities, "max_tokens": choices.randint(4, 24), **more}, text


async def _answer(session: aiohttp.ClientSession, choices: random.Random) -> str:
    body, text = _body(choices)
    async with session.post(CHAT, json=body) as reply:
        answer = await reply.json()
        if reply.status == 404 and GUEST in text:
            return "404 of the guest"
        if reply.status != 200 or not answer.get("choices"):
            raise Unexpected(f"{reply.status} {json.dumps(answer)[:_SHOWN]}")
    return "200"


async def _stream(session: aiohttp.ClientSession, choices: random.Random) -> str:
    body, text = _body(choices, stream=True)
    async with session.post(CHAT, json=body) as reply:
        received = await reply.read()
        if reply.status == 404 and GUEST in text:
            return "404 of the guest"
        if reply.status != 200 or not received.endswith(_END):
            raise Unexpected(f"{reply.status} {received[-_SHOWN:]!r}")
    return "200"


async def _disconnect(session: aiohttp.ClientSession, choices: random.Random) -> str:
    """Leaves after the first event."""
    body, _ = _body(choices, stream=True, max_tokens=200)
    async with session.post(CHAT, json=body) as reply:
        await reply.content.readany()
        reply.close()
    return "left"


async def _wrong(session: aiohttp.ClientSession, choices: random.Random) -> str:
    wrong, status = choices.choice(WRONG)
    body = {**_body(choices)[0], **wrong} if isinstance(wrong, dict) else wrong
    return await _status(session.post(CHAT, json=body), status)


async def _list(session: aiohttp.ClientSession, choices: random.Random) -> str:
    path = choices.choice(("/v1/models", "/v1/abilities", "/v1/abilities/a0", "/metrics", "/ready"))
    return await _status(session.get(path), 200)


async def _status(request: Any, wanted: int) -> str:
    async with request as reply:
        text = await reply.text()
        if reply.status != wanted:
            raise Unexpected(f"{reply.status} instead of {wanted}: {text[:_SHOWN]}")
    return str(wanted)


def _packed_guest(base: Path, version: int) -> bytes:
    from act_serve.abilities.store import Store
    from tests.abilities_for_tests import publish_random

    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as shelf, tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        archive.add(publish_random(Store(Path(shelf)), base, GUEST, seed=version, version=version), arcname=GUEST)
    return buffer.getvalue()
