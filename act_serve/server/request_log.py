"""One line per request, for people or as JSON."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from act_serve.server.config import LogFormat
from act_serve.server.request_record import RequestRecord

_log = logging.getLogger("act_serve.requests")


def open_request_log() -> None:
    """Has the lines written to stderr, where nobody has given the logger ``act_serve.requests`` another handler."""
    _log.setLevel(logging.INFO)
    if not _log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)


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
