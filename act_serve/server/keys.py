"""API keys: who may call this server, with which abilities, and how often."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from act_serve.errors import AuthenticationError, PermissionDeniedError, ProfileError, RateLimitError
from act_serve.server.keys_file import KeyRecord, Role, read_keys_file

_log = logging.getLogger(__name__)
_BEARER = "bearer "
_ONE = 1 - 1e-9  # ten tenths do not add up to 1.0

# Request headers that carry a key; they end at the router.
SECRET_HEADERS = frozenset({"authorization", "x-api-key"})

Clock = Callable[[], float]
_Signature = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Key:
    """A caller that has been recognized.

    Attributes:
        id: what logs call it.
        roles: what it may do.
        abilities: names that it may use; None is all.
    """

    id: str
    roles: frozenset[Role]
    abilities: frozenset[str] | None = None

    def may_use(self, name: str) -> bool:
        """Whether the key may use the ability ``name``, which need not exist."""
        return self.abilities is None or name in self.abilities


# On a server without a keys file everybody may ask, and nobody may change anything.
OPEN = Key("anyone", frozenset({"infer"}))


class TokenBucket:
    """Lets ``burst`` requests pass at once and ``per_minute`` in the long run.

    Args:
        per_minute: how many requests become possible in a minute.
        burst: how many are possible after a long pause.
        clock: seconds that never go back.
    """

    def __init__(self, per_minute: float, burst: int, clock: Clock = time.monotonic) -> None:
        self.per_minute, self.burst, self._clock = per_minute, burst, clock
        self._left, self._then = float(burst), clock()

    def take(self) -> float:
        """Takes one request: 0 if it may pass, else the seconds until one may."""
        now = self._clock()
        self._left = min(self.burst, self._left + (now - self._then) * self.per_minute / 60)
        self._then = now
        if self._left < _ONE:
            return (1 - self._left) * 60 / self.per_minute
        self._left -= 1
        return 0.0


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    key: Key
    bucket: TokenBucket | None


class Keys:
    """The keys of one router.

    Args:
        path: the keys file; None is a server that is open to everybody and has no admin.
        clock: of the rate limits.

    Raises:
        ProfileError: the file cannot be read or is wrong.
    """

    def __init__(self, path: Path | None = None, clock: Clock = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._signature = None if path is None else _signature(path)
        self._entries = [] if path is None else self._read(path)

    @property
    def has_admin(self) -> bool:
        """Whether some key may change what is served; control routes are off without one."""
        return any("admin" in entry.key.roles for entry in self._entries)

    def check(self, headers: Mapping[str, str], role: Role | None) -> Key:
        """Recognizes the caller and counts the request.

        Args:
            headers: of the request; names in lower case, or a mapping that does not care.
            role: what the request needs; None is any key.

        Raises:
            AuthenticationError: there is no key, or an unknown one.
            PermissionDeniedError: the key lacks the role.
            RateLimitError: the key has been used too often.
        """
        if self._path is None:
            return _with_role(OPEN, role)
        token = _token(headers)
        if token is None:
            raise AuthenticationError(
                "this server needs an API key; send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
            )
        entry = self._find(hashlib.sha256(token.encode("utf-8", "replace")).digest())
        key = _with_role(entry.key, role)
        wait_s = entry.bucket.take() if entry.bucket else 0.0
        if wait_s:
            raise RateLimitError(
                f"the key '{key.id}' has used up its requests; try again in {wait_s:.1f} s",
                retry_after_s=math.ceil(wait_s),
            )
        return key

    async def run(self, period_s: float) -> None:
        """Reads the file again whenever it changes, for ever; looks every ``period_s`` seconds."""
        while self._path is not None:
            await asyncio.sleep(period_s)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Reads the file if it has changed; where it is wrong or gone, the former keys stay and the log says why."""
        if self._path is None or (signature := _signature(self._path)) == self._signature:
            return
        self._signature = signature
        try:
            self._entries = self._read(self._path)
        except ProfileError as exc:
            _log.error("the keys stay as they were: %s", exc)
        else:
            _log.info("read %d keys from %s", len(self._entries), self._path)

    def _find(self, digest: bytes) -> _Entry:
        """Compares with every key and stops at none, so that the time tells nothing."""
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        if found is None:
            raise AuthenticationError("this API key is not known to this server")
        return found

    def _read(self, path: Path) -> list[_Entry]:
        former = {entry.key.id: entry.bucket for entry in getattr(self, "_entries", [])}
        return [self._entry(record, former.get(record.id)) for record in read_keys_file(path)]

    def _entry(self, record: KeyRecord, former: TokenBucket | None) -> _Entry:
        key = Key(record.id, record.roles, record.abilities)
        return _Entry(bytes.fromhex(record.sha256), key, self._bucket(record, former))

    def _bucket(self, record: KeyRecord, former: TokenBucket | None) -> TokenBucket | None:
        per_minute = record.requests_per_minute
        if per_minute is None:
            return None
        burst = record.burst or max(1, math.ceil(per_minute))
        if former is not None and (former.per_minute, former.burst) == (per_minute, burst):
            return former  # reading the file again gives nobody a new allowance
        return TokenBucket(per_minute, burst, self._clock)


def _with_role(key: Key, role: Role | None) -> Key:
    if role is not None and role not in key.roles:
        raise PermissionDeniedError(f"the key '{key.id}' lacks the role '{role}' that this needs")
    return key


def _token(headers: Mapping[str, str]) -> str | None:
    authorization = headers.get("authorization", "")
    if authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip() or None
    return headers.get("x-api-key", "").strip() or None


def _signature(path: Path) -> _Signature | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
