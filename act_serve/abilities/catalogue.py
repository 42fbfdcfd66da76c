"""What the store holds, in memory: every request reads it, so no request waits for a disk."""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from act_serve.abilities.desired_state import AbilityState
from act_serve.abilities.store import Store
from act_serve.delta.composition import WeightedAbility
from act_serve.delta.manifest import MANIFEST_FILE, Manifest
from act_serve.errors import ArtifactDamagedError, StoreError, UnknownAbilityError

_Signature = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class VersionEntry:
    """One version of an ability: its manifest, or why the manifest cannot be used."""

    version: int
    manifest: Manifest | None
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class AbilityEntry:
    """One ability.

    Attributes:
        versions: those that are served, ascending; at least one.
        wanted: what the store's state says of it.
    """

    name: str
    versions: tuple[VersionEntry, ...]
    wanted: AbilityState = field(default_factory=AbilityState)

    @property
    def active(self) -> VersionEntry:
        """The version that requests get when they name none."""
        if self.wanted.active is None:
            return self.versions[-1]
        for entry in self.versions:
            if entry.version == self.wanted.active:
                return entry
        # Another version in its place could be the one that was rolled back from.
        return VersionEntry(self.wanted.active, None, "it is the active version and its files are gone")

    def version(self, number: int) -> VersionEntry:
        """One version.

        Raises:
            UnknownAbilityError: the store does not have it.
        """
        for entry in self.versions:
            if entry.version == number:
                return entry
        known = ", ".join(str(entry.version) for entry in self.versions)
        raise UnknownAbilityError(
            f"ability '{self.name}' has no version {number} on this server; it has {known}", param="abilities"
        )


@dataclass(frozen=True, slots=True)
class CatalogueView:
    """The catalogue at one moment; immutable, so a request sees one state from start to end."""

    entries: Mapping[str, AbilityEntry] = field(default_factory=dict)

    def ability(self, name: str) -> AbilityEntry:
        """The entry of an ability.

        Raises:
            UnknownAbilityError: there is none; the message offers near names.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise UnknownAbilityError(
                f"no ability '{name}' on this server{offer(name, self.entries)}", param="abilities"
            )
        return entry

    def pin(self, ability: WeightedAbility) -> WeightedAbility:
        """Fixes version and content: the active version where the request names none.

        Raises:
            UnknownAbilityError: no such ability or version, or the version's content is another one.
            ArtifactDamagedError: that version's manifest is damaged.
        """
        entry = self.ability(ability.name)
        chosen = entry.active if ability.version is None else entry.version(ability.version)
        if chosen.manifest is None:
            raise ArtifactDamagedError(
                f"ability '{entry.name}' version {chosen.version} is damaged: {chosen.damage}{_healthy_versions(entry)}"
            )
        digest = chosen.manifest.digest
        if ability.digest not in (None, digest):
            raise UnknownAbilityError(
                f"ability '{entry.name}' version {chosen.version} has the content {digest} on this server, "
                f"not {ability.digest}; leave the digest out to use what is here",
                param="abilities",
            )
        return WeightedAbility(entry.name, chosen.version, digest, ability.weight)

    def manifests(self) -> Iterable[Manifest]:
        """The active manifests that are in order, by name."""
        return (entry.active.manifest for entry in self.entries.values() if entry.active.manifest is not None)


class Catalogue:
    """Watches a store: :meth:`refresh` reads only what changed, :attr:`view` costs nothing.

    Args:
        store: the store to watch; it may be empty or not exist yet.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int], tuple[_Signature | None, VersionEntry]] = {}
        self._view = CatalogueView()
        self._unreadable_since: float | None = None

    @property
    def view(self) -> CatalogueView:
        """What the last refresh found."""
        return self._view

    @property
    def stale_s(self) -> float | None:
        """For how many seconds the store could not be read; None while it can be."""
        if self._unreadable_since is not None:
            return time.monotonic() - self._unreadable_since
        return self._store.stale_s

    def refresh(self) -> CatalogueView:
        """Lists the store and reads the manifests that are new or changed; safe from several threads.

        A manifest that cannot be used is listed with its damage and hides nothing else.

        Raises:
            StoreError: the store cannot be listed or its state not be read, or it is gone; the former view stays.
        """
        with self._lock:
            try:
                self._read_store()
            except (StoreError, OSError):
                self._unreadable_since = self._unreadable_since or time.monotonic()
                raise
            self._unreadable_since = None
            return self._view

    def _read_store(self) -> None:
        known: dict[tuple[str, int], tuple[_Signature | None, VersionEntry]] = {}
        entries: dict[str, AbilityEntry] = {}
        self._store.refresh()
        state = self._store.state()
        for name, published in self._store.published().items():
            wanted = state.of(name)
            if served := wanted.served(published):
                versions = tuple(self._entry(name, number, known) for number in served)
                entries[name] = AbilityEntry(name, versions, wanted)
        if self._view.entries:
            # Checked last: a store that leaves while it is being read would look like one with fewer abilities.
            self._store.check_there()
        self._known = known
        self._view = CatalogueView(MappingProxyType(entries))

    def _entry(
        self, name: str, number: int, known: dict[tuple[str, int], tuple[_Signature | None, VersionEntry]]
    ) -> VersionEntry:
        signature = self._signature(name, number)
        former = self._known.get((name, number))
        if former is None or former[0] != signature or signature is None:
            former = signature, self._read(name, number)
        known[name, number] = former
        return former[1]

    def _signature(self, name: str, number: int) -> _Signature | None:
        try:
            stat = (self._store.path(name, number) / MANIFEST_FILE).stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self, name: str, number: int) -> VersionEntry:
        try:
            return VersionEntry(number, self._store.manifest(name, number))
        except (ArtifactDamagedError, UnknownAbilityError, StoreError) as exc:
            return VersionEntry(number, None, str(exc))


def summary(entry: AbilityEntry) -> dict[str, Any]:
    """What lists show of an ability: the state of its active version."""
    active = entry.active
    manifest = active.manifest
    return {
        "name": entry.name,
        "object": "ability",
        "status": "damaged" if manifest is None else "ready",
        "damage": active.damage,
        "version": active.version,
        "versions": [version.version for version in entry.versions],
        "draining": sorted(entry.wanted.removed),
        "pinned": entry.wanted.pinned,
        "digest": manifest and manifest.digest,
        "kind": manifest and manifest.kind,
        "languages": list(manifest.languages) if manifest else [],
        "description": manifest.description if manifest else "",
        "license": manifest and manifest.license,
        "bytes": manifest and manifest.counts.bytes,
    }


def details(entry: AbilityEntry) -> dict[str, Any]:
    """The summary with the manifest of the active version, or None where it is damaged."""
    manifest = entry.active.manifest
    return {**summary(entry), "manifest": manifest and manifest.model_dump(mode="json")}


def offer(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: near names, else all names, else that there are none."""
    names = sorted(known)
    near = difflib.get_close_matches(name[:80], names, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    if not names:
        return "; it has none yet"
    shown = ", ".join(names[:20])
    return f"; it has {shown}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"


def _healthy_versions(entry: AbilityEntry) -> str:
    healthy = [str(v.version) for v in entry.versions if v.manifest is not None]
    return f"; name a version that is in order: {', '.join(healthy)}" if healthy else "; publish it again"
