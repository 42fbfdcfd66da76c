"""The other abilities of a store that fit the same base: measured beside an ability, and its company in training."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, read_artifact
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import Manifest
from act_serve.errors import ArtifactDamagedError, BuildError, RequestError, StoreError, UnknownAbilityError
from act_serve.pipeline.compose import compose
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


@dataclass(frozen=True, slots=True, eq=False)
class Companion:
    """A composition of published abilities as one delta; `key` names their contents and weights in stage records."""

    key: tuple[tuple[str, float], ...]
    deltas: Mapping[str, ModuleDelta]


def neighbours(store: Store, base: Path, without: str, left_out: Callable[[str], None]) -> list[Neighbour]:
    """Every ability but `without` that was built for `base`, in the version that requests get.

    One that can't be read is no reason to lose a build: `left_out` is told which, and why.
    """
    found = []
    for name, manifest in _fitting(store, base, left_out).items():
        if name != without:
            try:
                found.append(_read(store, manifest))
            except (ArtifactDamagedError, StoreError, UnknownAbilityError) as exc:
                left_out(f"nothing is measured beside {name}@{manifest.version}: {exc}")
    return found


def neighbour_labels(store: Store, base: Path, without: str) -> list[str]:
    """The labels of :func:`neighbours`, without reading their rows."""
    return [f"{name}@{manifest.version}" for name, manifest in _fitting(store, base).items() if name != without]


def company(profile: Profile, store: Store, base: Path) -> tuple[Companion, ...]:
    """The compositions that `finetune.company` names.

    Raises BuildError when one cannot be read, names no ability, or names one that the store lacks, BaseMismatchError
    when it names a version that was built for another base, and ArtifactDamagedError when it names a damaged one.
    """
    there = _fitting(store, base) if profile.finetune.company else {}
    return tuple(_companion(text, profile.name, store, base, there) for text in profile.finetune.company)


def _companion(text: str, trained: str, store: Store, base: Path, there: Mapping[str, Manifest]) -> Companion:
    try:
        wanted = Composition.parse(text).abilities
    except RequestError as exc:
        raise BuildError(f"finetune.company: {exc}") from exc
    if not wanted:
        raise BuildError(f"finetune.company: {text!r} names no ability; steps on the base alone are taken anyway")
    for ability in wanted:
        if ability.name not in there:
            with suppress(UnknownAbilityError):
                store.manifest(ability.name)  # which says so where it is damaged
    missing = [
        ability.name if ability.version is None else f"{ability.name}@{ability.version}"
        for ability in wanted
        if ability.name not in there
        or ability.name == trained
        or (ability.version is not None and ability.version not in store.versions(ability.name))
    ]
    if missing:
        raise BuildError(
            f"finetune.company names {', '.join(missing)}, which {store.root} does not have for this base; "
            "build that first, or take it off the list"
        )
    weights = [ability.weight for ability in wanted]
    found = [store.named(ability) for ability in wanted]
    artifacts = [store.fetch(manifest.name, manifest.version) for manifest in found]
    key = tuple(zip((manifest.tensors_sha256 for manifest in found), weights, strict=True))
    return Companion(key, compose(list(zip(artifacts, weights, strict=True)), base))


def _fitting(store: Store, base: Path, left_out: Callable[[str], None] = lambda _: None) -> dict[str, Manifest]:
    """The manifests of what requests get, by name; without those that can't be read, which `left_out` is told."""
    fingerprint, found = fingerprint_model(base), {}
    for name in store.names():
        try:
            manifest = store.manifest(name)
        except UnknownAbilityError:  # all of its versions are removed
            continue
        except (ArtifactDamagedError, StoreError) as exc:
            left_out(f"nothing is measured beside {name}: {exc}")
            continue
        if manifest.base_fingerprint == fingerprint:
            found[name] = manifest
    return found


def _read(store: Store, manifest: Manifest) -> Neighbour:
    deltas = read_artifact(store.fetch(manifest.name, manifest.version))[1]
    return Neighbour(manifest.name, manifest.version, manifest.tensors_sha256, deltas)
