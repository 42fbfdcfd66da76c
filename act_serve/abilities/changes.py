"""What an operator does to a store: add, remove, activate and pin; each whole or not at all, and one at a time."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from act_serve.abilities.desired_state import (
    AbilityState,
    DesiredState,
    locked,
    read_state,
    write_state,
)
from act_serve.abilities.store import Store
from act_serve.delta.durable import sync_folder
from act_serve.delta.manifest import Manifest
from act_serve.errors import ExistsError, RequestError, StoreError, UnknownAbilityError

_INCOMING, _GONE = ".incoming-", ".gone-"
# A folder of these names that is older was left by a process that died.
_LEFT_BEHIND_S = 3600.0


@contextmanager
def incoming(store: Store) -> Iterator[Path]:
    """An empty folder beside the abilities, which is removed afterwards unless :func:`add` has taken it.

    Raises:
        StoreError: the disk refuses.
    """
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=store.root))
    except OSError as exc:
        raise StoreError(f"nothing can be added to the ability store {store.root}: {exc.strerror}") from exc
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def add(store: Store, folder: Path, verify: Callable[[Path], Manifest], *, name: str | None = None,
        activate: bool = False) -> Manifest:  # fmt: skip
    """Makes an artifact folder from :func:`incoming` the version that its manifest says.

    Args:
        verify: reads and checks it, or raises.
        name: what it must be called; None accepts any.
        activate: whether requests that name no version get it from now on, even where another one is activated.

    Raises:
        ExistsError: the store has that version.
        RequestError: it is another ability than ``name``.
        StoreError: the disk refuses; and whatever ``verify`` raises.
    """
    manifest = verify(folder)
    if name not in (None, manifest.name):
        raise RequestError(f"that is the ability '{manifest.name}', not {ascii(name)[:80]}", param="name")
    target = store.path(manifest.name, manifest.version)
    with _changing(store) as state:
        if target.exists():
            removed = manifest.version in state.of(manifest.name).removed
            raise ExistsError(
                f"ability '{manifest.name}' has a version {manifest.version}"
                + (" that is being removed; try again in a minute" if removed else "; publish a new version")
            )
        if store.mirror is not None:
            store.mirror.publish(folder, manifest.name, manifest.version)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)
            folder.rename(target)
            sync_folder(target.parent)
        if activate:
            _replace(store, state, manifest.name, active=manifest.version)
    return manifest


def activate(store: Store, name: str, version: int) -> None:
    """Serves this version to requests that name none; a roll-back where it is a lower one.

    Raises:
        UnknownAbilityError: there is no such version.
        ArtifactDamagedError: its manifest is damaged.
        StoreError: the disk refuses.
    """
    with _changing(store) as state:
        if version not in _served(store, state, name):
            raise _unknown(store, state, name, version)
        store.manifest(name, version)
        _replace(store, state, name, active=version)


def pin(store: Store, name: str, pinned: bool) -> None:
    """Whether engines keep the ability resident as long as they can.

    Raises:
        UnknownAbilityError: there is none.
        StoreError: the disk refuses.
    """
    with _changing(store) as state:
        if not _served(store, state, name):
            raise _unknown(store, state, name)
        _replace(store, state, name, pinned=pinned)


def remove(store: Store, name: str, version: int | None = None) -> list[int]:
    """Serves a version, or the whole ability, no more; :func:`sweep` removes the files later.

    Returns:
        the versions that are removed.

    Raises:
        UnknownAbilityError: there is no such ability or version.
        ExistsError: it is the active version, and there are others.
        StoreError: the disk refuses.
    """
    with _changing(store) as state:
        served = _served(store, state, name)
        if not served or version not in (None, *served):
            raise _unknown(store, state, name, version)
        gone = served if version is None else [version]
        wanted = state.of(name)
        if len(gone) < len(served) and (wanted.active or served[-1]) in gone:
            raise ExistsError(f"version {version} of ability '{name}' is the active one; activate another one first")
        removed = {**wanted.removed, **dict.fromkeys(gone, time.time())}
        if len(gone) == len(served):
            wanted = AbilityState()
        _replace(store, state, name, active=wanted.active, pinned=wanted.pinned, removed=removed)
        return gone


def sweep(store: Store, drain_s: float) -> None:
    """Removes the files of versions that were removed ``drain_s`` ago, and what dead processes left behind.

    Raises:
        StoreError: the disk refuses.
    """
    now = time.time()
    due = {(name, version) for name, wanted in store.state().abilities.items()
           for version, since in wanted.removed.items() if now - since >= drain_s}  # fmt: skip
    if due:
        with _changing(store) as state:
            for name, version in sorted(due):
                removed = dict(state.of(name).removed)
                if removed.pop(version, None) is None:
                    continue  # another process was faster
                if store.mirror is not None:
                    store.mirror.discard(name, version)
                elif (folder := store.path(name, version)).exists():
                    folder.rename(store.root / f"{_GONE}{name}-{version}-{time.time_ns()}")
                state = _replace(store, state, name, removed=removed)
    for left in (*store.root.glob(f"{_GONE}*"), *store.root.glob(f"{_INCOMING}*")):
        if left.name.startswith(_GONE) or now - _modified(left, now) > _LEFT_BEHIND_S:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _changing(store: Store) -> Iterator[DesiredState]:
    try:
        with locked(store.root), nullcontext() if store.mirror is None else store.mirror.changing():
            yield read_state(store.root)
    except OSError as exc:
        raise StoreError(f"the ability store {store.root} cannot be changed: {exc.strerror}") from exc


def _replace(store: Store, state: DesiredState, name: str, **changes: object) -> DesiredState:
    state = state.having(name, AbilityState.model_validate({**state.of(name).model_dump(), **changes}))
    if store.mirror is not None:
        store.mirror.write_state(state)
    else:
        write_state(store.root, state)
    return state


def _served(store: Store, state: DesiredState, name: str) -> list[int]:
    return state.of(name).served(store.versions(name))


def _unknown(store: Store, state: DesiredState, name: str, version: int | None = None) -> UnknownAbilityError:
    served = _served(store, state, name)
    if not served:
        return UnknownAbilityError(f"there is no ability '{name}' in the store", param="name")
    known = ", ".join(map(str, served))
    return UnknownAbilityError(f"ability '{name}' has no version {version}; it has {known}", param="version")


def _modified(folder: Path, otherwise: float) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return otherwise
