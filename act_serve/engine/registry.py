"""Makes a composition known to vLLM's OpenAI app before the request that needs it is let through."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Iterable, Set
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from act_serve import errors
from act_serve.delta.composition import Composition
from act_serve.delta.manifest import Counts
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.admission import Admission, split_model
from act_serve.engine.held import Held
from act_serve.engine.metrics import AbilityMetrics
from act_serve.engine.resolver import adapter_request
from act_serve.engine.seats import Seats
from act_serve.errors import ActServeError, EngineError, RequestError, StoreError, UnknownAbilityError

# Compositions that vLLM's app remembers; an entry is a few hundred bytes. Far more than can be in flight at once.
_CAPACITY = 16_384
_POLL_S = 0.003
_PINNED_S = 2.0

logger = init_logger("vllm.act_serve")


@dataclass(frozen=True, slots=True)
class _Known:
    """A composition that passed admission.

    Attributes:
        request: its adapter; ``sizes``: the bytes of its abilities by their canonical names.
        changes_lm_head: whether one of them has rows there.
    """

    request: LoRARequest
    sizes: dict[AbilityKey, int]
    changes_lm_head: bool


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
        self.metrics = AbilityMetrics(self.seats)
        self._leaving: set[AbilityKey] = set()
        self._pinned_before: set[AbilityKey] = set()
        self._left_out: set[AbilityKey] = set()
        self._staying: set[AbilityKey] = set()
        self._complaints: dict[str, str] = {}
        self._fetching: dict[AbilityKey, asyncio.Future[Any]] = {}
        self._last_id = 0

    @asynccontextmanager
    async def hold(self, model: str) -> AsyncIterator[None]:
        """While it is open, vLLM's app can serve ``model``, a base name or ``BASE:<pinned composition>``.

        Raises:
            ActServeError: it is malformed, unknown, damaged, for another base, or could not be loaded.
        """
        if self.is_base(model):
            yield
            return
        known = await self._admitted(model)
        if not self.seats.ready(known.sizes):
            self.seats.check(known.sizes)
            await self._fetch(known.sizes)  # which may take long, and nobody else should wait for it
        await self.seats.take(known.sizes, lambda: self._load(known.sizes.keys()))
        try:
            # Where all abilities are resident, a new composition needs nothing from the engine: the worker learns of
            # it with the first step that uses it.
            self._adapters[model] = known.request
            await self._forget_oldest()
            yield
        finally:
            self.seats.leave(known.sizes)

    def is_base(self, model: str) -> bool:
        """Whether ``model`` names the base alone."""
        return model in self._base_names

    async def changes_lm_head(self, model: str) -> bool:
        """Whether ``model`` is a composition with rows of lm_head; raises as :meth:`hold` where it is not admitted."""
        return not self.is_base(model) and (await self._admitted(model)).changes_lm_head

    def held(self, name: str) -> list[Held]:
        """What this engine holds of the versions of an ability, or is about to."""
        return [
            Held(key.version, key.digest, of.users, of.waiting, of.size, of.closing)
            for key, of in sorted(self.seats.occupancy().items())
            if key.name == name
        ]

    async def load_pinned(self) -> None:
        """Makes the active versions of pinned abilities resident, as many as there is room for when all others leave.

        Those that are pinned already stay before new ones.

        What cannot be loaded is logged, and left to the requests for it, which say what is wrong; where it is the store
        that failed, it is tried again at the next look.
        """
        try:
            wanted = await asyncio.to_thread(self._active_pinned)
        except Exception as exc:
            self._complain("the state", exc)
            return
        if wanted != self._pinned_before:
            self._pinned_before, self._left_out = wanted, set()
        self._staying &= wanted
        for key in sorted(wanted):
            try:
                if not self.seats.ready([key]) and key not in self._left_out:
                    async with self.hold(f"{next(iter(self._base_names))}:{key}"):
                        logger.info("Loaded pinned ability %s ahead of requests", key)
            except Exception as exc:
                if not isinstance(exc, StoreError):  # each try would take the room of others again
                    self._left_out.add(key)
                self._complain(str(key), exc)
            if self.seats.ready([key]):  # also what a request has loaded since
                self._staying.add(key)
                self._complaints.pop(str(key), None)

    async def keep_pinned(self) -> None:
        """Loads what is pinned, or activated of what is pinned, from now on; until it is cancelled."""
        while True:
            await asyncio.sleep(_PINNED_S)
            await self.load_pinned()

    def _active_pinned(self) -> set[AbilityKey]:
        store, found = self._admission.store, set()
        abilities = store.state().abilities
        self._complaints.pop("the state", None)
        for name, state in abilities.items():
            try:
                if state.pinned and store.versions(name):
                    manifest = store.manifest(name)
                    found.add(AbilityKey(manifest.name, manifest.version, manifest.digest))
                    self._complaints.pop(name, None)
            except ActServeError as exc:  # which the others have no part in; what is resident stays
                found |= {key for key in self._pinned_before if key.name == name}
                self._complain(name, exc)
        return found

    def _complain(self, what: str, exc: Exception) -> None:
        """Logs why something is not loaded ahead, once and not at every look, until it is."""
        if self._complaints.get(what) != str(exc):
            self._complaints[what] = str(exc)
            expected = isinstance(exc, ActServeError)
            logger.warning(
                "Of what is pinned, %s is not loaded ahead: %s",
                what,
                exc if expected else repr(exc),
                exc_info=not expected,
            )

    async def _admitted(self, model: str) -> _Known:
        known = self._known.get(model) or self._known.setdefault(model, await self._admit(model))
        self._known.move_to_end(model)
        return known

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
        return _Known(request, self._sizes(pinned), self._admission.changes_lm_head(pinned))

    def _sizes(self, pinned: Composition) -> dict[AbilityKey, int]:
        """Resident bytes by ability: values in the engine's dtype, and a 4-byte index per row."""
        return {AbilityKey.of(ability): self._size(self._admission.counts(ability)) for ability in pinned.abilities}

    def _size(self, counts: Counts) -> int:
        return counts.parameters * self._value_bytes + counts.channels * 4

    async def _load(self, keys: Set[AbilityKey]) -> None:
        """The workers read in a thread of theirs, so that requests in flight get their tokens meanwhile.

        Under load every call waits for the running step to end, so what leaves goes with the call that starts the
        loading, and the call that finds it done makes the abilities resident.
        """
        start_s = time.perf_counter()
        await self._fetch(keys)
        wanted, lacking = [astuple(key) for key in keys], sum(key not in self.seats for key in keys)
        try:
            while True:
                leaving = self._leaving - keys
                reports = await self._ask("load_abilities", wanted, [astuple(key) for key in leaving])
                self._leaving -= leaving | keys
                held = {AbilityKey(*key) for *_, resident in reports for key in resident}
                # A step may have taken back what a request needed whose client had left; it leaves with the next call.
                self._leaving |= {key for key in held - keys if key not in self.seats}
                for _, error, message, _ in reports:
                    if error:
                        raise getattr(errors, error)(message)
                if all(ready for ready, *_ in reports):
                    self.metrics.loads.inc(lacking)
                    self.metrics.load_seconds.observe(time.perf_counter() - start_s)
                    return
                await asyncio.sleep(_POLL_S)
        except BaseException:  # the request may have gone, too; some workers may have what others lack
            self._leaving |= {key for key in keys if key not in self.seats}
            raise

    async def _fetch(self, keys: Iterable[AbilityKey]) -> None:
        """Has the files of what is not resident on this machine: a store's cache may have evicted them meanwhile.

        Requests that wait for the same files wait for one thread.
        """
        for key in keys:
            if key in self.seats:
                continue
            if key not in self._fetching:
                fetching = self._admission.in_thread(self._admission.store.fetch, key.name, key.version)
                self._fetching[key] = asyncio.ensure_future(fetching)
                self._fetching[key].add_done_callback(partial(self._fetched, key))
            await asyncio.shield(self._fetching[key])

    def _fetched(self, key: AbilityKey, done: asyncio.Future[Any]) -> None:
        del self._fetching[key]
        if not done.cancelled():
            done.exception()  # seen, also where everybody who waited has left

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        try:
            return await self._client.collective_rpc(method, args=args)
        except Exception as exc:  # vLLM raises a bare Exception with the worker's text
            raise EngineError(f"the engine failed at {method}{args}: {exc}") from exc

    def _pinned(self, keys: Iterable[AbilityKey]) -> set[AbilityKey]:
        """Those that the last look at the store said should stay, and that there was room for."""
        return self._staying.intersection(keys)

    async def _evict(self, key: AbilityKey) -> None:
        """Makes vLLM forget all compositions with this ability; the workers free it with the next load's first call.

        Their memory grows by no other call, so the budget holds.
        """
        for model in [model for model, known in self._known.items() if key in known.sizes]:
            self._adapters.pop(model, None)
        self._leaving.add(key)
        self.metrics.evictions.inc()

    async def _forget_oldest(self) -> None:
        while len(self._known) > _CAPACITY:
            model, known = self._known.popitem(last=False)
            if self._adapters.pop(model, None):
                await self._client.remove_lora(known.request.lora_int_id)
