"""Clients that ask without pause while things break, and how each of their requests ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

COMPLETIONS = "/v1/completions"
# How a request can end, beside an error's status as text.
ANSWERED, ERROR_EVENT, DISCONNECTED = "answered", "error event", "disconnected"
# No end at all: nothing within the client's patience; a stream that stops as if it were complete; an error without
# OpenAI's error object.
HANGS, CUT_OFF, SHAPELESS = "hangs", "cut off", "shapeless"
NO_END = frozenset({HANGS, CUT_OFF, SHAPELESS})
_PATIENCE_S = 120.0
_MOMENT_S = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """One request that has ended: what was asked, how it ended, and the tokens that came."""

    composition: str
    prompt: tuple[int, ...]
    stream: bool
    begun_s: float
    how: str
    tokens: tuple[int, ...]
    message: str = ""


@dataclass
class Traffic:
    """Clients with a composition each; two of three stream.

    Attributes:
        http: connected to the server; without a timeout of its own.
        compositions: one per client.
        prompts: token ids; the clients take turns with them.
        max_tokens: of every answer.
        pause_s: between two requests of a client; less ends the pauses that have begun, too.
        streams: the tokens so far of each stream that has not ended.
    """

    http: httpx.AsyncClient
    base: str
    compositions: Sequence[str]
    prompts: Sequence[tuple[int, ...]]
    max_tokens: int
    pause_s: float = _MOMENT_S
    ended: list[Ended] = field(default_factory=list)
    stopped: bool = False
    streams: list[list[int]] = field(default_factory=list)

    async def client(self, number: int) -> None:
        """Asks until the traffic stops."""
        turn = number
        while not self.stopped:
            prompt = self.prompts[turn % len(self.prompts)]
            ended = await self.ask(self.compositions[number], prompt, stream=_streams(number))
            self.ended.append(ended)
            turn += 1
            since = time.monotonic()
            while not self.stopped and time.monotonic() < since + self.pause_s:
                await asyncio.sleep(_MOMENT_S)

    async def ask(self, composition: str, prompt: tuple[int, ...], *, stream: bool) -> Ended:
        """Sends one request and waits for its end."""
        body = {
            "model": f"{self.base}:{composition}" if composition else self.base, "prompt": list(prompt),
            "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
            "stream": stream,
        }  # fmt: skip
        begun_s, tokens = time.monotonic(), list[int]()
        if stream:
            self.streams.append(tokens)
        try:
            async with (
                asyncio.timeout(_PATIENCE_S),
                self.http.stream("POST", COMPLETIONS, json=body) as reply,
            ):
                if reply.status_code != 200:
                    how, message = _error(reply.status_code, await reply.aread())
                elif stream:
                    how, message = await _events(reply, tokens)
                else:
                    tokens += json.loads(await reply.aread())["choices"][0]["token_ids"]
                    how, message = ANSWERED, ""
        except TimeoutError:
            how, message = HANGS, ""
        except httpx.TransportError as exc:
            how, message = DISCONNECTED, repr(exc)
        finally:
            self.streams = [other for other in self.streams if other is not tokens]
        return Ended(composition, prompt, stream, begun_s, how, tuple(tokens), message)

    async def all_streaming(self) -> None:
        """Waits until every client that streams is in the middle of an answer."""
        wanted = sum(map(_streams, range(len(self.compositions))))
        while len([s for s in self.streams if 0 < len(s) < 0.9 * self.max_tokens]) < wanted:
            await asyncio.sleep(0.01)

    async def all_answered(self) -> None:
        """Waits until every client has the answer to a request that it sent from now on."""
        since, wanted = time.monotonic(), set(self.compositions)
        while wanted:
            await asyncio.sleep(0.05)
            wanted -= {e.composition for e in self.ended[-200:] if e.how == ANSWERED and e.begun_s > since}


def _streams(client: int) -> bool:
    return client % 3 != 2


def _error(status: int, body: bytes) -> tuple[str, str]:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return SHAPELESS, f"{status}: {body[:300]!r}"
    if error.keys() != {"message", "type", "param", "code"} or error["code"] != status:
        return SHAPELESS, f"{status}: {error}"
    return str(status), error["message"]


async def _events(reply: httpx.Response, tokens: list[int]) -> tuple[str, str]:
    async for line in reply.aiter_lines():
        if line == "data: [DONE]":
            return ANSWERED, ""
        if line.startswith("data: "):
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return ERROR_EVENT, event["error"]["message"]
            for choice in event["choices"]:
                tokens += choice["token_ids"] or []
    return CUT_OFF, ""
