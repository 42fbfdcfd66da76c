"""Times and counts the tokens of one answer without parsing it."""

from __future__ import annotations

import time

from act_serve.server.metrics import RouterMetrics
from act_serve.server.request_record import RequestRecord

_EVENT = b"data: {"
# Inside a JSON string the quotes would have backslashes: no generated text can look like these.
_USAGE = (b'"completion_tokens":', b'"output_tokens":')
_NO_TOKEN = b'"choices":[]'
_TAIL_BYTES = 4096


class AnswerMeter:
    """Counts one answer for each ability that it is served with.

    Tokens are those of the answer's own usage. A stream without one counts its events: vLLM sends one per token, or
    one for several tokens where it falls behind, so these are a lower bound.

    Args:
        metrics: of the router.
        abilities: names; none is the base alone.
        record: of the request; gets the tokens.
    """

    __slots__ = ("_between", "_events", "_first", "_generated", "_last_s", "_opening", "_record", "_tail")

    def __init__(self, metrics: RouterMetrics, abilities: list[str], record: RequestRecord) -> None:
        labels = [metrics.label(name) for name in abilities] or ["none"]
        self._first = [metrics.first_token.labels(label) for label in labels]
        self._between = [metrics.between_tokens.labels(label) for label in labels]
        self._generated = [metrics.tokens.labels(label) for label in labels]
        self._record = record
        # A chat opens with an event that only names the role.
        self._opening = 1 if record.path == "/v1/chat/completions" else 0
        self._events, self._last_s, self._tail = 0, 0.0, b""

    def passed(self, events: bytes) -> None:
        """Whole events of a stream have gone to the client; some microseconds each."""
        self._tail = (self._tail + events)[-_TAIL_BYTES:]
        number = events.count(_EVENT) - events.count(_NO_TOKEN)
        if number <= 0:
            return
        now_s = time.perf_counter()
        if self._events == 0:
            for first in self._first:
                first.observe(now_s - self._record.started_s)
        elif self._events > self._opening:
            each_s = (now_s - self._last_s) / number
            for between in self._between:
                for _ in range(number):
                    between.observe(each_s)
        self._events += number
        self._last_s = now_s

    def stream_ended(self) -> None:
        """Counts a stream's tokens, however it ended."""
        self._count(_usage(self._tail), max(0, self._events - self._opening))

    def whole(self, body: bytes) -> None:
        """Counts the tokens of an answer in one piece; one without usage has none."""
        self._count(_usage(body), 0)

    def _count(self, usage: int | None, events: int) -> None:
        self._record.tokens = events if usage is None else usage
        for generated in self._generated:
            generated.inc(self._record.tokens)


def _usage(text: bytes) -> int | None:
    """The last usage in ``text``; searched from its end, so that a large answer costs no more than a small one."""
    for name in _USAGE:
        at = text.rfind(name)
        if at >= 0:
            digits = text[at + len(name) : at + len(name) + 20].lstrip()
            end = next((n for n, byte in enumerate(digits) if not 48 <= byte <= 57), len(digits))
            if end:
                return int(digits[:end])
    return None
