"""Everything that can be wrong with a composition is found here, before the engine is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from act_serve.abilities.store import Store
from act_serve.delta.artifact import check_size, read_artifact
from act_serve.delta.channels import LM_HEAD
from act_serve.delta.composition import Composition, WeightedAbility
from act_serve.delta.fingerprint import check_base
from act_serve.delta.fit import ModuleShape, check_modules
from act_serve.delta.manifest import Counts, Manifest, ModelFingerprint
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.graph_limits import check_count

# Reads of the store, downloads too, that may be under way at once; they wait more than they compute.
_STORE_THREADS = 64
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Verified:
    """An ability that fits: its size, and whether it changes lm_head."""

    counts: Counts
    lm_head: bool


class Admission:
    """Pins compositions to versions and contents of the store that fit the served base.

    Args:
        store: where abilities are.
        fingerprint: of the served base checkpoint.
        modules: what the engine can change, when known; None leaves that check to the worker.
        tensors: whether to read the tensors too. Not needed where the workers, which read them anyway, say what is
            wrong with them before a request is let through.
        most_abilities: of one composition; None is no limit.
    """

    def __init__(
        self,
        store: Store,
        fingerprint: ModelFingerprint,
        modules: Mapping[str, ModuleShape] | None = None,
        *,
        tensors: bool = True,
        most_abilities: int | None = None,
    ) -> None:
        self._most_abilities = most_abilities
        self.store, self._fingerprint, self.modules, self._tensors = store, fingerprint, modules, tensors
        self._verified: dict[AbilityKey, _Verified] = {}
        self._threads = ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="act-serve-store")

    async def pin(self, composition: Composition) -> Composition:
        """The same composition with every version and content digest filled in.

        Each version is verified once in the life of the process; artifacts are immutable.

        Raises:
            UnknownAbilityError: an ability or version is not in the store, or has other content than was asked for.
            ArtifactDamagedError, BaseMismatchError: it is there and cannot be used.
            RequestError: it names more abilities than the engine takes.
        """
        check_count(len(composition.abilities), self._most_abilities)
        return Composition.of([await self._pinned(ability) for ability in composition.abilities])

    async def in_thread(self, work: Callable[..., Result], *args: Any) -> Result:
        """Runs what may wait for the store in a thread of its own kind, so that only its like can be held up by it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def counts(self, pinned: WeightedAbility) -> Counts:
        """Numbers of rows and values of an ability that :meth:`pin` gave back."""
        return self._verified[AbilityKey.of(pinned)].counts

    def changes_lm_head(self, pinned: Composition) -> bool:
        """Whether an ability of a composition that :meth:`pin` gave back has rows of lm_head."""
        return any(self._verified[AbilityKey.of(ability)].lm_head for ability in pinned.abilities)

    async def _pinned(self, ability: WeightedAbility) -> WeightedAbility:
        if ability.digest is not None and AbilityKey.of(ability) in self._verified:
            return ability  # without the store: what is resident is served while that is away, or slow
        return await self.in_thread(self._pin, ability)

    def _pin(self, ability: WeightedAbility) -> WeightedAbility:
        manifest = self.store.named(ability)
        self._verify(manifest, self.store.fetch(manifest.name, manifest.version))
        return WeightedAbility(manifest.name, manifest.version, manifest.digest, ability.weight)

    def _verify(self, manifest: Manifest, folder: Path) -> None:
        key = AbilityKey(manifest.name, manifest.version, manifest.digest)
        if key in self._verified:
            return
        what = f"ability {manifest.name}@{manifest.version}"
        check_base(manifest.base_fingerprint, self._fingerprint, what=what)
        if self.modules is not None:
            check_modules(manifest, self.modules, what=what)
        if self._tensors:
            read_artifact(folder, what)
        else:
            check_size(manifest, folder, what=what)
        self._verified[key] = _Verified(manifest.counts, LM_HEAD in manifest.modules)


def split_model(model: str, base_names: Collection[str]) -> Composition | None:
    """The composition in a request's ``model``, ``BASE:fr+math*0.5``; None when it names none of ``base_names``.

    Raises:
        RequestError: the part after the colon is not a composition.
    """
    base, colon, text = model.rpartition(":")
    if not colon or base not in base_names:
        return None
    return Composition.parse(text)
