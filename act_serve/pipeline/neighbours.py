"""The other abilities of a store that fit the same base: measured beside an ability, and its company in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, read_artifact
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import Manifest
from act_serve.errors import BuildError
from act_serve.profile.schema import Profile


@dataclass(frozen=True, slots=True, eq=False)
class Neighbour:
    """A published ability; `key` names its content in stage records."""

    name: str
    version: int
    key: str
    deltas: Mapping[str, ModuleDelta]

    @property
    def label(self) -> str:
        """Name and version, as requests write them."""
        return f"{self.name}@{self.version}"


def neighbours(store: Store, base: Path, without: str) -> list[Neighbour]:
    """The latest version of every ability but `without` that was built for `base`."""
    return [_read(store, manifest) for name, manifest in _fitting(store, base).items() if name != without]


def company(profile: Profile, store: Store, base: Path) -> tuple[Neighbour, ...]:
    """The abilities that `finetune.company` names; raises BuildError when the store lacks one."""
    wanted = profile.finetune.company
    there = _fitting(store, base) if wanted else {}
    missing = [name for name in wanted if name not in there or name == profile.name]
    if missing:
        raise BuildError(
            f"finetune.company names {', '.join(missing)}, which {store.root} does not have for this base; "
            "build that first, or take it off the list"
        )
    return tuple(_read(store, there[name]) for name in wanted)


def _fitting(store: Store, base: Path) -> dict[str, Manifest]:
    fingerprint = fingerprint_model(base)
    latest = (store.manifest(name, store.latest(name)) for name in store.names())
    return {manifest.name: manifest for manifest in latest if manifest.base_fingerprint == fingerprint}


def _read(store: Store, manifest: Manifest) -> Neighbour:
    deltas = read_artifact(store.fetch(manifest.name, manifest.version))[1]
    return Neighbour(manifest.name, manifest.version, manifest.tensors_sha256, deltas)
