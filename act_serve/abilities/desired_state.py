"""What an operator wants served, in one small file of the store: every router and engine reads it, so it survives them.

``state.json`` lies in the store's root. Without it the highest version of every ability is served.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from act_serve.delta.durable import sync_folder
from act_serve.delta.manifest import Name
from act_serve.errors import StoreError

STATE_FILE = "state.json"
_LOCK_FILE = ".state.lock"
_LOCK_TIMEOUT_S = 30.0


class AbilityState(BaseModel):
    """What is wanted of one ability.

    Attributes:
        active: the version that requests get which name none; None is the highest.
        pinned: whether engines keep it resident as long as they can.
        removed: versions that are not served any more, and when that was said (seconds of the epoch). Their files
            stay a while, for the requests that began with them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    active: PositiveInt | None = None
    pinned: bool = False
    removed: dict[PositiveInt, Annotated[float, Field(ge=0)]] = {}

    def served(self, versions: Iterable[int]) -> list[int]:
        """Those of the store's versions that requests may have."""
        return [version for version in versions if version not in self.removed]


class DesiredState(BaseModel):
    """What is wanted of every ability; those it does not name are as :class:`AbilityState` without arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    abilities: dict[Name, AbilityState] = {}

    def of(self, name: str) -> AbilityState:
        """What is wanted of one ability."""
        return self.abilities.get(name, AbilityState())

    def having(self, name: str, state: AbilityState) -> DesiredState:
        """The same with another state of one ability; the default state is left out."""
        kept = {**self.abilities, name: state}
        return DesiredState(abilities={n: s for n, s in sorted(kept.items()) if s != AbilityState()})


def read_state(root: Path) -> DesiredState:
    """The desired state of the store in ``root``.

    Raises:
        StoreError: it cannot be read. What to serve is unknown then; a guess could undo a roll-back.
    """
    path = root / STATE_FILE
    try:
        return DesiredState.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return DesiredState()
    except OSError as exc:
        raise StoreError(f"{path} cannot be read: {exc.strerror}") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise StoreError(
            f"{path} is not a store's state: {where}: {first['msg']}; restore it, or delete it to serve the highest "
            "version of every ability"
        ) from exc


def write_state(root: Path, state: DesiredState) -> None:
    """Replaces the file so that readers see the old or the new one; hold :func:`locked` from reading to writing.

    Raises:
        StoreError: the disk refuses; the old file stays.
    """
    staged: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{STATE_FILE}-", dir=root)
        staged = Path(name)
        with os.fdopen(handle, "w") as file:
            file.write(state.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        staged.chmod(0o644)
        staged.replace(root / STATE_FILE)
        sync_folder(root)
    except OSError as exc:
        if staged is not None:
            staged.unlink(missing_ok=True)
        raise StoreError(f"{root / STATE_FILE} cannot be written: {exc.strerror}; nothing was changed") from exc


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """While it is open, no other process or thread changes the store.

    Raises:
        StoreError: the lock cannot be had.
    """
    from filelock import FileLock, Timeout

    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / _LOCK_FILE, timeout=_LOCK_TIMEOUT_S)
        lock.acquire()
    except Timeout:
        raise StoreError(f"{root} is being changed by someone else for {_LOCK_TIMEOUT_S:g} s; try again") from None
    except OSError as exc:
        raise StoreError(f"the ability store {root} cannot be changed: {exc.strerror}") from exc
    try:
        yield
    finally:
        lock.release()
