"""Turns the result of a build into an artifact in the store."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, count_modules, entries_of, serialize_modules, write_artifact
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import EVALUATION_FILE, Localization, Manifest, Score
from act_serve.models.families import channel_modules
from act_serve.profile.schema import Profile


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the build measured: `scores` for the manifest, `details` for evaluation.json."""

    scores: tuple[Score, ...]
    details: Mapping[str, Any]
    calibration: str


def publish(
    *, profile: Profile, base: Path, source: Path, deltas: Mapping[str, ModuleDelta], evidence: Evidence, store: Store
) -> Path:
    """Writes the next version of the ability into `store`, in the profile's stored form, and returns its folder.

    Raises StoreError when the store can't be written.
    """
    tensors = serialize_modules(deltas, profile.stored)
    widths = {module.name: module.out_features for module in channel_modules(base)}
    version = store.next_version(profile.name)
    manifest = Manifest(
        name=profile.name,
        version=version,
        kind=profile.kind,
        languages=profile.languages,
        description=profile.description,
        exemplars=profile.exemplars,
        license=profile.license,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=base.name,
        base_fingerprint=fingerprint_model(base),
        source=profile.source.model or f"trained from {base.name} on the profile's data",
        source_fingerprint=fingerprint_model(source),
        localization=_localization(profile, evidence.calibration),
        modules=entries_of(deltas, widths),
        stored=profile.stored,
        counts=count_modules(deltas, len(tensors)),
        tensors_sha256=hashlib.sha256(tensors).hexdigest(),
        scores=evidence.scores,
    )
    text = json.dumps(evidence.details, indent=2, ensure_ascii=False) + "\n"
    return write_artifact(store.path(profile.name, version), manifest, tensors, {EVALUATION_FILE: text.encode()})


def _localization(profile: Profile, calibration: str) -> Localization:
    return Localization(
        ranking=profile.localize.ranking,
        p=profile.localize.p,
        strength=profile.transfer.strength,
        seed=profile.seed,
        calibration=calibration,
        fine_tune_steps=profile.finetune.steps,
    )
