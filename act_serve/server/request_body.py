"""Reads a request body once: bounded, parsed, checked to be a JSON object."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.types import Receive, Scope

from act_serve.errors import RequestError, TooLargeError

# A client that is still sending does not read the answer; what is over the limit is drained, not kept.
_DRAIN_FACTOR = 8


class ClientGoneError(Exception):
    """The client closed the connection while it was sending."""


async def read_body(receive: Receive, scope: Scope, limit_bytes: int) -> bytes:
    """The whole body.

    Raises:
        TooLargeError: it is larger than ``limit_bytes``.
        ClientGoneError: the client went away.
    """
    chunks: list[bytes] = []
    size, drain_bytes = 0, limit_bytes * _DRAIN_FACTOR
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    more = not (announced.isdigit() and int(announced) > drain_bytes)
    if not more:
        size = int(announced)
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit_bytes:
            chunks.append(chunk)
        more = message.get("more_body", False) and size <= drain_bytes
    if size > limit_bytes:
        raise TooLargeError(f"the request body is larger than this server's limit of {limit_bytes} bytes; send less")
    return b"".join(chunks)


def parse_body(body: bytes) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        RequestError: it is not JSON, not an object, or holds NaN or infinities, which JSON does not have.
    """
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        detail = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)[:200]
        raise RequestError(f"the request body is not valid JSON: {detail}") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"the request body must be a JSON object, not {type(parsed).__name__}")
    return parsed


def is_json(scope: Scope) -> bool:
    """Whether the request's body is to be read as JSON: everything but uploads of forms and files."""
    kind = dict(scope["headers"]).get(b"content-type", b"application/json").lower()
    return not kind.startswith((b"multipart/", b"audio/", b"application/octet-stream"))


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number; numbers must be finite")
