"""Turns deltas into an artifact in the store."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from act_serve.abilities.changes import add, incoming
from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, count_modules, entries_of, serialize_modules, write_artifact
from act_serve.delta.channels import OUTSIDE
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import EVALUATION_FILE, Localization, Manifest, ModelFingerprint, Score, Stored
from act_serve.models.families import channel_modules
from act_serve.profile.schema import Profile


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the build measured: `scores` for the manifest, `details` for evaluation.json."""

    scores: tuple[Score, ...]
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Descent:
    """Where the rows come from, for the manifest: the ability model, and how its channels were chosen."""

    source: str
    fingerprint: ModelFingerprint | None
    localization: Localization | None


def publish(
    *,
    profile: Profile,
    base: Path,
    descent: Descent,
    deltas: Mapping[str, ModuleDelta],
    evidence: Evidence,
    store: Store,
) -> Path:
    """Writes the next version of a built ability into `store`, in the profile's stored form, and returns its folder.

    Raises StoreError when the store can't be written.
    """
    text = json.dumps(evidence.details, indent=2, ensure_ascii=False) + "\n"
    return publish_deltas(
        store=store,
        deltas=deltas,
        channels=channel_counts(base),
        stored=profile.stored,
        files={EVALUATION_FILE: text.encode()},
        name=profile.name,
        kind=profile.kind,
        languages=profile.languages,
        description=profile.description,
        exemplars=profile.exemplars,
        license=profile.license,
        base=base.name,
        base_fingerprint=fingerprint_model(base),
        source=descent.source,
        source_fingerprint=descent.fingerprint,
        localization=descent.localization,
        scores=evidence.scores,
    )


def publish_deltas(
    *,
    store: Store,
    deltas: Mapping[str, ModuleDelta],
    channels: Mapping[str, int],
    stored: Stored,
    files: Mapping[str, bytes] | None = None,
    **facts: Any,
) -> Path:
    """Writes deltas as the next version of the ability `facts["name"]` and returns its folder.

    `channels` gives each module's number of channels; `facts` are the other fields of the manifest. Raises StoreError
    when the store can't be written, ArtifactDamagedError when the deltas hold NaN.
    """
    store.refresh()
    tensors = serialize_modules(deltas, stored)
    manifest = Manifest(
        version=store.next_version(facts["name"]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        modules=entries_of(deltas, channels),
        stored=stored,
        counts=count_modules(deltas, len(tensors)),
        tensors_sha256=hashlib.sha256(tensors).hexdigest(),
        **facts,
    )
    if store.mirror is None:
        return write_artifact(store.path(manifest.name, manifest.version), manifest, tensors, files)
    with incoming(store) as folder:
        add(store, write_artifact(folder / "artifact", manifest, tensors, files), lambda _: manifest)
    return store.path(manifest.name, manifest.version)


def channel_counts(base: Path) -> dict[str, int]:
    """The number of channels of each module of the model in `base` that holds channels."""
    return {module.name: module.out_features for module in channel_modules(base, OUTSIDE)}


def published(name: str, folder: Path, store: Store) -> str:
    """What to tell who published a version into `folder`, and that requests do not get it where that is so."""
    version, served = int(folder.name), store.active(name)
    told = f"published {name}@{version} in {folder}"
    if served == version:
        return told
    place = store.root if store.mirror is None else store.mirror.remote.location.shown
    return (
        f"{told}\nrequests for '{name}' without a version get {name}@{served}, as the store's state says, "
        f"until you run: act-serve ability activate {name} {version} --store {place}"
    )
