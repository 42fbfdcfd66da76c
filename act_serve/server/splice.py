"""Puts the ``act`` object into an answer by splicing bytes, so that no token is parsed a second time."""

from __future__ import annotations

_EVENT = b"data: {"


def into_object(body: bytes, report: bytes) -> bytes:
    """``{...}`` becomes ``{"act":REPORT,...}``; what is not a JSON object stays as it is."""
    if not body.startswith(b"{"):
        return body
    rest = body[1:]
    comma = b"" if rest.lstrip()[:1] == b"}" else b","
    return b'{"act":' + report + comma + rest


def into_first_event(events: bytes, report: bytes) -> bytes:
    """As :func:`into_object`, in the first server-sent event that carries an object."""
    start = events.find(_EVENT)
    if start < 0:
        return events
    at = start + len(_EVENT) - 1
    return events[:at] + into_object(events[at:], report)


def has_event(events: bytes) -> bool:
    """Whether the first event with an object has begun to arrive."""
    return _EVENT in events


def whole_events(pending: bytes) -> tuple[bytes, bytes]:
    """Splits after the last complete event: what may be sent, and what must wait for its end."""
    end = pending.rfind(b"\n\n") + 2
    return (b"", pending) if end == 1 else (pending[:end], pending[end:])
