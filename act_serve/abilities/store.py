"""The ability store: one folder per ability, one immutable artifact folder per version in it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from act_serve.abilities.desired_state import DesiredState, read_state
from act_serve.abilities.location import cache_limit, is_url, parse_url
from act_serve.abilities.mirror import Mirror
from act_serve.abilities.remote import Remote
from act_serve.delta.composition import WeightedAbility, check_name
from act_serve.delta.manifest import MANIFEST_FILE, Manifest, read_manifest
from act_serve.errors import ArtifactDamagedError, RequestError, StoreError, UnknownAbilityError
from act_serve.home import cache_home


@dataclass(frozen=True, slots=True)
class Store:
    """A folder ``<root>/<name>/<version>/``; temporary folders start with a dot and are never listed.

    Attributes:
        root: the folder; it need not exist yet (an empty store).
        mirror: what keeps the folder like an object store, where the store lies in one; see :func:`open_store`.
    """

    root: Path
    mirror: Mirror | None = None

    @property
    def stale_s(self) -> float | None:
        """For how many seconds the object store could not be read; None while it can be, and for a folder."""
        return None if self.mirror is None else self.mirror.stale_s

    def refresh(self) -> None:
        """Brings the folder up to date with the object store; where that fails, what is cached stays in service.

        Raises:
            StoreError: it fails, and nothing is cached.
        """
        if self.mirror is not None:
            self.mirror.refresh()

    def state(self) -> DesiredState:
        """What is wanted of every ability, at most about a second old.

        Raises:
            StoreError: it cannot be read.
        """
        self._follow()
        return read_state(self.root)

    def fetch(self, name: str, version: int) -> Path:
        """The folder of a published version, its tensors in it; downloads them where they are not here yet.

        Raises:
            ArtifactDamagedError: the object store holds other tensors than the manifest says.
            StoreError: they are not here, and the object store cannot be read; or the folder is gone.
            UnknownAbilityError: the version has been removed.
        """
        if self.mirror is not None:
            return self.mirror.fetch(check_name(name), int(version))
        self.check_there()
        folder = self.path(name, version)
        if not folder.is_dir():
            raise UnknownAbilityError(f"ability '{name}' version {version} is not here any more", param="abilities")
        return folder

    def check_there(self) -> None:
        """For what was in the store before: a folder that is gone says nothing of the abilities in it.

        Raises:
            StoreError: the folder is gone.
        """
        if not self.root.is_dir():
            raise StoreError(f"the ability store {self.root} is not there; put it back, or mount its file system again")

    def _follow(self) -> None:
        if self.mirror is not None:
            self.mirror.follow()

    def published(self) -> dict[str, list[int]]:
        """Every ability that has a version, in order, and its published versions, ascending.

        Raises:
            StoreError: the folder cannot be listed.
        """
        self._follow()
        found = {name: self._listed(name) for name in _listing(self.root) if _is_name(name)}
        return {name: versions for name, versions in found.items() if versions}

    def names(self) -> list[str]:
        """Names of the abilities with at least one version, sorted.

        Raises:
            StoreError: the folder cannot be listed.
        """
        return list(self.published())

    def versions(self, name: str) -> list[int]:
        """Published versions of an ability, ascending; empty when there are none."""
        self._follow()
        return self._listed(check_name(name))

    def _listed(self, name: str) -> list[int]:
        folder = os.path.join(self.root, name)  # not a Path: a router lists a large store every second
        return sorted(int(entry) for entry in _listing(folder)
                      if entry.isascii() and entry.isdecimal() and entry[0] != "0"
                      and os.path.isfile(os.path.join(folder, entry, MANIFEST_FILE)))  # fmt: skip

    def latest(self, name: str) -> int:
        """The highest published version.

        Raises:
            UnknownAbilityError: there is none.
        """
        versions = self.versions(name)
        if not versions:
            raise UnknownAbilityError(f"there is no ability '{name}' in the store", param="abilities")
        return versions[-1]

    def active(self, name: str) -> int:
        """The version that requests get which name none: the one that the store's state says, else the highest.

        Raises:
            UnknownAbilityError: there is none.
            StoreError: the state cannot be read.
        """
        wanted = self.state().of(name)
        served = wanted.served(self.versions(name))
        if not served:
            raise UnknownAbilityError(f"there is no ability '{name}' in the store", param="abilities")
        return wanted.active or served[-1]

    def path(self, name: str, version: int) -> Path:
        """Folder of one version, published or not."""
        return self.root / check_name(name) / str(int(version))

    def manifest(self, name: str, version: int | None = None) -> Manifest:
        """The checked manifest of a version, by default the active one.

        Raises:
            UnknownAbilityError: no such ability or version.
            ArtifactDamagedError: the manifest is malformed, or names another ability or version than its folder.
            StoreError: the store's folder is gone, or its state cannot be read.
        """
        version = self.active(name) if version is None else version
        folder = self.path(name, version)
        if self.mirror is not None and not (folder / MANIFEST_FILE).is_file():
            self.mirror.refresh()  # a router elsewhere may have seen it before this machine did
        if not (folder / MANIFEST_FILE).is_file():
            self.check_there()
            raise UnknownAbilityError(
                f"ability '{name}' has no version {version} here, only {self.versions(name)}", param="abilities"
            )
        manifest = read_manifest(folder, what=f"ability {name}@{version}")
        if (manifest.name, manifest.version) != (name, version):
            raise ArtifactDamagedError(
                f"the store's folder {name}/{version} holds {manifest.name}@{manifest.version}; "
                f"move it to {manifest.name}/{manifest.version}"
            )
        return manifest

    def named(self, ability: WeightedAbility) -> Manifest:
        """The manifest of what a composition names: a version or the active one, and the content that it pins.

        Raises:
            UnknownAbilityError: no such ability or version, or the version's content is another one.
            ArtifactDamagedError, StoreError: as :meth:`manifest`.
        """
        manifest = self.manifest(ability.name, ability.version)
        if ability.digest not in (None, manifest.digest):
            raise UnknownAbilityError(
                f"ability '{ability.name}' version {manifest.version} has content {manifest.digest} in the store, "
                f"not {ability.digest}",
                param="abilities",
            )
        return manifest

    def next_version(self, name: str) -> int:
        """The version that a new artifact of this ability gets."""
        return max(self.versions(name), default=0) + 1


def open_store(place: str | Path) -> Store:
    """The store in a folder, or at a URL of any file system that fsspec knows, such as ``s3://bucket/prefix``.

    Touches no network: a URL's store is read when it is first asked. Its folder lies under the user's cache, and has
    the layout of every other store's.

    Raises:
        StoreError: the URL is malformed.
    """
    if not is_url(place):
        return Store(Path(place))
    location = parse_url(str(place))
    if location.protocol in ("file", "local"):
        return Store(Path(location.shown.partition("://")[2]))
    # By what was shown, so that another key for the same store finds the same folder.
    folder = cache_home() / "stores" / hashlib.sha256(location.shown.encode()).hexdigest()[:16]
    return Store(folder.absolute(), Mirror(Remote(location), folder.absolute(), cache_limit()))


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except RequestError:
        return False
    return True


def _listing(folder: str | Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise StoreError(f"the ability store {folder} cannot be listed: {exc.strerror}") from exc
