"""What is known of one request: its parts fill it in, and the log and the metrics read it at the end."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import cast

from starlette.datastructures import Headers
from starlette.types import Scope

from act_serve.server.keys import Key, Keys
from act_serve.server.keys_file import Role

REQUEST_ID_HEADER = "x-request-id"
# It goes into logs and into vLLM's own request ids.
_WELL_FORMED = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_IN_SCOPE = "act_serve.request"


@dataclass(slots=True)
class RequestRecord:
    """One request of a client.

    Attributes:
        id: the client's, where it is well-formed, else a new one.
        method, path: as they came, the path percent-encoded and without its query.
        started_s: by ``time.perf_counter``.
        key: the API key's id, never the key; None before it is recognized.
        composition: what the request was served with, as in ``x-act-abilities``; None where it needs none.
        tokens: generated, as far as they could be counted.
        error: the class of the router's own error.
        status: where it isn't that of the answer, because the client has gone.
    """

    id: str
    method: str
    path: str
    started_s: float = field(default_factory=time.perf_counter)
    key: str | None = None
    composition: str | None = None
    tokens: int | None = None
    error: str | None = None
    status: int | None = None

    @classmethod
    def begin(cls, scope: Scope) -> RequestRecord:
        """A record of the request that ``scope`` describes, to be found there by :func:`record_of`."""
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _WELL_FORMED.fullmatch(given) else uuid.uuid4().hex
        record = cls(request_id, scope["method"], scope["raw_path"].decode("latin-1"))
        scope[_IN_SCOPE] = record
        return record


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that ``scope`` belongs to."""
    return cast("RequestRecord", scope[_IN_SCOPE])


def recognized(scope: Scope, keys: Keys, role: Role | None) -> Key:
    """The key of a request, noted in its record; raises as :meth:`Keys.check` does."""
    key = keys.check(Headers(scope=scope), role)
    record_of(scope).key = key.id
    return key
