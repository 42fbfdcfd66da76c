"""The ability store: one folder per ability, one immutable artifact folder per version in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from act_serve.abilities.desired_state import read_state
from act_serve.delta.composition import check_name
from act_serve.delta.manifest import MANIFEST_FILE, Manifest, read_manifest
from act_serve.errors import ArtifactDamagedError, RequestError, StoreError, UnknownAbilityError


@dataclass(frozen=True, slots=True)
class Store:
    """A folder ``<root>/<name>/<version>/``; temporary folders start with a dot and are never listed.

    Attributes:
        root: the folder; it need not exist yet (an empty store).
    """

    root: Path

    def names(self) -> list[str]:
        """Names of the abilities with at least one version, sorted.

        Raises:
            StoreError: the folder cannot be listed.
        """
        return [name for name in _listing(self.root) if _is_name(name) and self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """Published versions of an ability, ascending; empty when there are none."""
        folder = self.root / check_name(name)
        return sorted(int(entry) for entry in _listing(folder)
                      if entry.isascii() and entry.isdecimal() and entry[0] != "0"
                      and (folder / entry / MANIFEST_FILE).is_file())  # fmt: skip

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
        wanted = read_state(self.root).of(name)
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
        """
        version = self.active(name) if version is None else version
        folder = self.path(name, version)
        if not (folder / MANIFEST_FILE).is_file():
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

    def next_version(self, name: str) -> int:
        """The version that a new artifact of this ability gets."""
        return max(self.versions(name), default=0) + 1


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except RequestError:
        return False
    return True


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise StoreError(f"the ability store {folder} cannot be listed: {exc.strerror}") from exc
