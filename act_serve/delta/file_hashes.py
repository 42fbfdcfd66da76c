"""sha256 of large files, remembered until the file system says that one is another or was written to."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from act_serve.home import cache_home

_CHUNK_BYTES = 1 << 20
_COARSEST_TIME_NS = 2_000_000_000
_hashed: dict[tuple[int, ...], str] = {}  # by this process, which may have nowhere to note it


def file_state(file: int) -> tuple[int, ...]:
    """What is another one after every change of an open file; the last of it is when, in nanoseconds."""
    found = os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_settled(state: tuple[int, ...]) -> bool:
    """Whether the next change will have another time, which file systems keep to the ms or to the second."""
    return time.time_ns() - state[-1] > _COARSEST_TIME_NS


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read when this user's processes have not yet hashed it as it is; raises OSError."""
    with path.open("rb", buffering=0) as file:
        state = file_state(file.fileno())
        note = _note(path, state)
        if known := _hashed.get(state) or _noted(note, state):
            return known
        settled = is_settled(state)  # before it is read: a change in the meantime has another time only then
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        if settled and file_state(file.fileno()) == state:
            _hashed[state] = digest.hexdigest()
            _keep(note, state, digest.hexdigest())
    return digest.hexdigest()


def _note(path: Path, state: tuple[int, ...]) -> Path:
    """Where the hash of a file is noted; a shared disk has another number on every machine."""
    named = f"{state[0]} {path.resolve()}"
    return cache_home() / "hashes" / f"{hashlib.sha256(os.fsencode(named)).hexdigest()[:32]}.json"


def _noted(note: Path, state: tuple[int, ...]) -> str | None:
    try:
        before, digest = json.loads(note.read_bytes())
    except (OSError, ValueError, TypeError):
        return None
    return str(digest) if before == list(state) else None


def _keep(note: Path, state: tuple[int, ...], digest: str) -> None:
    with suppress(OSError):  # it will be hashed again
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(prefix=f".{note.stem}.", dir=note.parent)
        try:
            with open(handle, "w", encoding="ascii") as file:
                json.dump([list(state), digest], file)
            os.replace(staged, note)
        except OSError:
            os.unlink(staged)
            raise
