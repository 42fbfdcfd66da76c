"""Errors as OpenAI's error object: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Send

from act_serve.errors import ActServeError, AuthenticationError, OverloadedError
from act_serve.server.request_record import record_of

_log = logging.getLogger(__name__)


def error_object(exc: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an error; anything unforeseen is a 500 that tells no internals, and is logged."""
    if isinstance(exc, ActServeError):
        status, message, kind = exc.http_status, str(exc), type(exc).__name__
    else:
        _log.error("unforeseen error", exc_info=exc)
        status, message, kind = 500, "internal error of the router; its log has the details", "InternalServerError"
    return status, {"error": {"message": message, "type": kind, "param": getattr(exc, "param", None), "code": status}}


def error_headers(exc: Exception) -> dict[str, str]:
    """What the client should know about an error beside its body: when to come again, or how to identify itself."""
    if isinstance(exc, OverloadedError):
        return {"retry-after": str(exc.retry_after_s)}
    return {"www-authenticate": "Bearer"} if isinstance(exc, AuthenticationError) else {}


async def answer_error(request: Request, exc: Exception) -> JSONResponse:
    """What the app's own routes answer when they raise; send_error does the same without FastAPI."""
    record_of(request.scope).error = type(exc).__name__
    status, body = error_object(exc)
    return JSONResponse(body, status, error_headers(exc))


async def send_error(send: Send, exc: Exception) -> int:
    """Answers with the error and returns its status; nothing may have been sent before."""
    status, body = error_object(exc)
    headers = error_headers(exc).items()
    await send_json(send, status, body, [(name.encode(), value.encode()) for name, value in headers])
    return status


async def send_json(send: Send, status: int, body: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Answers with a JSON body."""
    text = json.dumps(body).encode()
    length = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": length + (headers or [])})
    await send({"type": "http.response.body", "body": text})


def error_event(message: str, path: str) -> bytes:
    """The server-sent event that ends a stream which cannot be finished.

    The OpenAI and Anthropic clients raise on it; the responses and messages endpoints name their events.
    """
    error = {"message": message, "type": "EngineError", "param": None, "code": 503}
    name = b"event: error\n" if path.startswith(("/v1/responses", "/v1/messages")) else b""
    body = {"type": "error", "error": error} if name else {"error": error}
    return name + b"data: " + json.dumps(body).encode() + b"\n\n"
