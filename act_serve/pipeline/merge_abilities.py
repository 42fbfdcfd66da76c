"""Merges abilities of a store into a new ability."""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, read_artifact
from act_serve.delta.fingerprint import check_base
from act_serve.delta.manifest import EVALUATION_FILE, Manifest, Merge, Parent, Stored
from act_serve.pipeline.conflict import conflict
from act_serve.pipeline.merge import Share, merge_deltas
from act_serve.pipeline.merge_recipe import Recipe
from act_serve.pipeline.publish import publish_deltas


@dataclass(frozen=True, slots=True)
class Part:
    """An ability that takes part in a merge."""

    manifest: Manifest
    share: Share

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.manifest.name}@{self.manifest.version}"


def read_parts(recipe: Recipe, store: Store) -> list[Part]:
    """Reads the recipe's abilities.

    Raises UnknownAbilityError for one that the store lacks, ArtifactError for one that is damaged or belongs to
    another base than the first.
    """
    parts: list[Part] = []
    for ability, density in recipe.abilities():
        found = store.named(ability)
        manifest, deltas = read_artifact(store.fetch(found.name, found.version))
        part = Part(manifest, Share(deltas, ability.weight, density))
        if parts:
            check_base(manifest.base_fingerprint, parts[0].manifest.base_fingerprint, what=part.label)
        parts.append(part)
    return parts


def merge_parts(recipe: Recipe, parts: list[Part]) -> dict[str, ModuleDelta]:
    """The merged deltas, float32; raises DataError when nothing is left."""
    return merge_deltas([part.share for part in parts], recipe.merge_method, recipe.seed)


def conflicts(parts: list[Part]) -> dict[tuple[str, str], dict[str, Any]]:
    """The conflict figures of every pair, by their names and versions."""
    return {
        (left.label, right.label): conflict(left.share.deltas, right.share.deltas)
        for left, right in combinations(parts, 2)
    }


def publish_merged(
    *, recipe: Recipe, parts: list[Part], store: Store, name: str, stored: Stored, description: str | None = None
) -> Path:
    """Merges, writes the next version of the ability `name` into `store`, and returns its folder.

    Its evaluation.json holds the conflict figures of every pair, and no scores: nothing is measured here. Licences,
    languages and exemplars are those of all parents. Raises StoreError when the store can't be written and DataError
    when nothing is left of the parents.
    """
    manifests = [part.manifest for part in parts]
    found = {"+".join(pair): figures for pair, figures in conflicts(parts).items()}
    kinds = {manifest.kind for manifest in manifests}
    return publish_deltas(
        store=store,
        deltas=merge_parts(recipe, parts),
        channels={module: entry.out_features for m in manifests for module, entry in m.modules.items()},
        stored=stored,
        files={EVALUATION_FILE: (json.dumps({"conflicts": found}, indent=2) + "\n").encode()},
        name=name,
        kind=kinds.pop() if len(kinds) == 1 else "other",
        languages=_all(manifest.languages for manifest in manifests),
        description=description or f"Merged by {recipe.merge_method} from {', '.join(part.label for part in parts)}.",
        exemplars=_all(manifest.exemplars for manifest in manifests),
        license="; ".join(_all((manifest.license,) for manifest in manifests)),
        base=manifests[0].base,
        base_fingerprint=manifests[0].base_fingerprint,
        merge=Merge(method=recipe.merge_method, seed=recipe.seed, parents=tuple(_parent(part) for part in parts)),
    )


def _parent(part: Part) -> Parent:
    manifest, share = part.manifest, part.share
    return Parent(
        name=manifest.name,
        version=manifest.version,
        tensors_sha256=manifest.tensors_sha256,
        weight=share.weight,
        density=share.density,
    )


def _all(groups: Any) -> tuple[str, ...]:
    """Every text once, in order."""
    return tuple(dict.fromkeys(text for group in groups for text in group))
