"""One line per request, for people or as JSON: on stderr, or on that of the process that started Ray."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import SocketHandler
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingUnixStreamServer
from typing import Any

from act_serve.server.config import LogFormat
from act_serve.server.request_record import RequestRecord

# Ray keeps what its workers write in files. A socket in the place that this names takes the lines to a terminal, too.
SOCKET_VARIABLE = "ACT_SERVE_REQUEST_LOG"
_HELD_UP_S, _PAUSE_S = 0.05, 5.0
_TURN_S = 1.0

_log = logging.getLogger("act_serve.requests")


def open_request_log() -> None:
    """Has the lines written, where nobody has given the logger ``act_serve.requests`` another handler."""
    _log.setLevel(logging.INFO)
    if _log.handlers:
        return
    _log.addHandler(logging.StreamHandler())
    if place := os.environ.get(SOCKET_VARIABLE):
        _log.addHandler(_TerminalHandler(place, None))
    for handler in _log.handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))


class _TerminalHandler(SocketHandler):
    """Sends lines to a socket on this machine; some are lost where a terminal stands still."""

    def makePickle(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode()

    def makeSocket(self, timeout: float = _HELD_UP_S) -> socket.socket:
        return super().makeSocket(timeout)

    def send(self, s: Any) -> None:
        super().send(s)
        if self.sock is None:  # or the next line would be held up as well
            self.retryTime = time.time() + _PAUSE_S


@contextmanager
def shown_request_lines(folder: Path) -> Iterator[None]:
    """Writes the lines of routers that are started meanwhile to this process's stderr.

    Args:
        folder: for the socket.
    """
    terminal, turn = sys.stderr, threading.Lock()

    class Shown(StreamRequestHandler):
        def handle(self) -> None:
            if not turn.acquire(timeout=_TURN_S):  # the terminal stands still; who comes meanwhile is sent away
                return
            try:
                for line in self.rfile:
                    print(line.decode(errors="replace"), end="", file=terminal, flush=True)
            finally:
                turn.release()

    os.environ[SOCKET_VARIABLE] = str(folder / "requests")
    try:
        with ThreadingUnixStreamServer(os.environ[SOCKET_VARIABLE], Shown) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True, name="request-lines").start()
            try:
                yield
            finally:
                server.shutdown()
    finally:
        del os.environ[SOCKET_VARIABLE]


def log_request(record: RequestRecord, status: int, seconds: float, log_format: LogFormat) -> None:
    """Writes the line of a request that has ended.

    Args:
        record: of the request.
        status: of its answer; 499 where the client has gone.
        seconds: from its arrival to the end of its answer.
        log_format: json is one object with the time in UTC; what isn't known is null.
    """
    if not _log.isEnabledFor(logging.INFO):
        return
    outcome = {
        "composition": record.composition,
        "seconds": round(seconds, 6),
        "tokens": record.tokens,
        "error": record.error,
    }
    if log_format == "json":
        fields = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": record.id,
            "key": record.key,
            "method": record.method,
            "path": record.path,
            "status": status,
            **outcome,
        }
        _log.info("%s", json.dumps(fields))
        return
    rest = " ".join(f"{name}={value}" for name, value in outcome.items() if value is not None)
    _log.info("%s %s %s %d key=%s %s", record.id, record.method, record.path, status, record.key or "-", rest)
