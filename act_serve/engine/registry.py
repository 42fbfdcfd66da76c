"""Makes a composition known to vLLM's OpenAI app before the request that needs it is let through."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from typing import Any

from vllm.lora.request import LoRARequest

from act_serve.delta.composition import Composition
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.admission import Admission, split_model
from act_serve.engine.resolver import adapter_request
from act_serve.engine.seats import Seats
from act_serve.errors import EngineError, RequestError, StoreError, UnknownAbilityError

# Compositions that vLLM's app remembers; an entry is a few hundred bytes. Far more than can be in flight at once.
_CAPACITY = 16_384
_POLL_S = 0.003


@dataclass(frozen=True, slots=True)
class _Known:
    """A composition that passed admission: its adapter, and the bytes of its abilities by their canonical names."""

    request: LoRARequest
    sizes: dict[AbilityKey, int]


class CompositionRegistry:
    """Registers pinned compositions as vLLM adapters, and keeps their abilities resident while requests use them.

    Args:
        engine_client: vLLM's; ``models``: the app's ``OpenAIServingModels``, whose adapter table is kept here.
        admission: what a composition must pass first.
        base_names: names that may stand before the colon.
        max_resident_bytes: budget of the resident abilities.
    """

    def __init__(
        self,
        engine_client: Any,
        models: Any,
        admission: Admission,
        base_names: Collection[str],
        max_resident_bytes: int,
    ) -> None:
        self._client, self._admission, self._base_names = engine_client, admission, base_names
        self._adapters: dict[str, LoRARequest] = models.lora_requests
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._value_bytes = engine_client.model_config.dtype.itemsize
        self.seats = Seats(max_resident_bytes, self._evict, self._pinned)
        self._last_id = 0

    @asynccontextmanager
    async def hold(self, model: str) -> AsyncIterator[None]:
        """While it is open, vLLM's app can serve ``model``, a base name or ``BASE:<pinned composition>``.

        Raises:
            ActServeError: it is malformed, unknown, damaged, for another base, or could not be loaded.
        """
        if model in self._base_names:
            yield
            return
        known = self._known.get(model) or self._known.setdefault(model, await self._admit(model))
        self._known.move_to_end(model)
        await self.seats.take(known.sizes, lambda: self._load(known))
        try:
            # Where all abilities are resident, a new composition needs nothing from the engine: the worker learns of
            # it with the first step that uses it.
            self._adapters[model] = known.request
            await self._forget_oldest()
            yield
        finally:
            self.seats.leave(known.sizes)

    async def _admit(self, model: str) -> _Known:
        composition = split_model(model, self._base_names)
        if composition is None:
            raise UnknownAbilityError(
                f"this engine serves {', '.join(self._base_names)}, not {model[:200]!r}", param="model"
            )
        if not composition:
            raise RequestError(
                f"{model[:200]!r} names no ability; for the base model leave the colon out", param="model"
            )
        pinned = await self._admission.pin(composition)
        self._last_id += 1
        request = adapter_request(model.rpartition(":")[0], pinned, self._last_id, self._admission.store)
        return _Known(request, self._sizes(pinned))

    def _sizes(self, pinned: Composition) -> dict[AbilityKey, int]:
        """Resident bytes by ability: values in the engine's dtype, and a 4-byte index per row."""
        sizes = {}
        for ability in pinned.abilities:
            counts = self._admission.store.manifest(ability.name, ability.version).counts
            key = AbilityKey.of(ability)
            sizes[key] = counts.parameters * self._value_bytes + counts.channels * 4
        return sizes

    async def _load(self, known: _Known) -> None:
        """The workers read in a thread of theirs, so that requests in flight get their tokens meanwhile."""
        keys = [astuple(key) for key in known.sizes]
        for key in known.sizes:  # the disk's cache may have evicted it since it was admitted
            await asyncio.to_thread(self._admission.store.fetch, key.name, key.version)
        try:
            while not all(await self._client.collective_rpc("prepare_abilities", args=(keys,))):
                await asyncio.sleep(_POLL_S)
            await self._client.add_lora(known.request)
        except Exception as exc:  # vLLM raises a bare Exception with the worker's text
            raise EngineError(f"the engine could not load {known.request.lora_name}: {exc}") from exc

    def _pinned(self, keys: Iterable[AbilityKey]) -> set[AbilityKey]:
        try:
            state = self._admission.store.state()
        except StoreError:  # a pin is a wish; a request must not fail for it
            return set()
        return {key for key in keys if state.of(key.name).pinned}

    async def _evict(self, key: AbilityKey) -> None:
        """Makes vLLM forget all compositions with this ability, and the workers free it."""
        for model in [model for model, known in self._known.items() if key in known.sizes]:
            self._adapters.pop(model, None)
        await self._client.collective_rpc("evict_ability", args=(key.name, key.version, key.digest))

    async def _forget_oldest(self) -> None:
        while len(self._known) > _CAPACITY:
            model, known = self._known.popitem(last=False)
            if self._adapters.pop(model, None):
                await self._client.remove_lora(known.request.lora_int_id)
