"""Lets plain ``vllm serve`` take ``"model": "BASE:fr+math*0.5"``, through vLLM's ``LoRAResolver`` seam."""

from __future__ import annotations

from collections.abc import Callable, Collection

from vllm.exceptions import VLLMNotFoundError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from act_serve.abilities.store import Store
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.engine.admission import Admission, split_model
from act_serve.engine.worker import checkpoint_folder
from act_serve.errors import ActServeError, RequestError


def adapter_request(base: str, composition: Composition, adapter_id: int, store: Store) -> LoRARequest:
    """The vLLM adapter that stands for a pinned composition.

    vLLM keys its prefix cache on name and path (vllm/v1/core/kv_cache_utils.py), so the name holds the contents'
    digests and the weights, and the path says which store.
    """
    return LoRARequest(lora_name=f"{base}:{composition}", lora_int_id=adapter_id, lora_path=str(store.root))


class AbilityResolver(LoRAResolver):
    """Finds compositions in the ability store.

    Args:
        store: where abilities are.
        base_names: names that clients may put before the colon; by default only the model's path.
    """

    def __init__(self, store: Store, base_names: Collection[str] = ()) -> None:
        self.store, self.base_names = store, base_names
        self._admission: Admission | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """As vLLM's; None for a name that does not begin with the base's.

        Raises:
            VLLMValidationError, VLLMNotFoundError, VLLMUnprocessableEntityError: vLLM answers 400, 404, 422.
        """
        try:
            composition = split_model(lora_name, {base_model_name, *self.base_names})
            if not composition:
                return None
            if self._admission is None:
                self._admission = Admission(self.store, fingerprint_model(checkpoint_folder(base_model_name)))
            pinned = await self._admission.pin(composition)
            if self._admission.changes_lm_head(pinned):
                raise RequestError(
                    f"{lora_name[:200]!r} changes lm_head, which `act-serve serve` serves and `vllm serve` does "
                    "not: there, requests may ask for prompt_logprobs, which would lack these changes"
                )
        except ActServeError as exc:
            if exc.http_status == 404:
                raise VLLMNotFoundError(str(exc)) from exc
            if exc.http_status == 400:
                raise VLLMValidationError(str(exc), parameter="model") from exc
            raise VLLMUnprocessableEntityError(str(exc)) from exc
        return adapter_request(lora_name.rpartition(":")[0], pinned, 1, self.store)  # vLLM sets the id


class CurrentAdapters(dict[str, LoRARequest]):
    """vLLM's table of adapters by requested name, in which a name is absent once it means another version.

    Args:
        store: says which version a name without one means now.
        forget: called with each adapter that leaves, because its name means another version or there are too many.
        capacity: adapters kept, the latest; far more than can be in flight at once.
    """

    def __init__(self, store: Store, forget: Callable[[LoRARequest], None], capacity: int = 16_384) -> None:
        super().__init__()
        self._store, self._forget, self._capacity = store, forget, capacity

    def __setitem__(self, name: str, request: LoRARequest) -> None:
        """Adds an adapter, and forgets the one that it replaces, and the oldest beyond the capacity.

        A request that still runs with the one that is forgotten keeps it: its next step makes it known again.
        """
        replaced = self.pop(name, None)
        super().__setitem__(name, request)
        if replaced is not None and replaced.lora_int_id != request.lora_int_id:
            self._forget(replaced)
        while len(self) > self._capacity:
            self._forget(self.pop(next(iter(self))))

    def __contains__(self, name: object) -> bool:
        """Whether the adapter is there and still what its name means."""
        request = self.get(name) if isinstance(name, str) else None
        if request is None:
            return False
        asked = Composition.parse(str(name).rpartition(":")[2]).abilities
        served = Composition.parse(request.lora_name.rpartition(":")[2]).abilities
        try:
            return all(
                ability.version is not None or self._store.active(ability.name) == pinned.version
                for ability, pinned in zip(asked, served, strict=True)
            )
        except ActServeError:
            return False  # resolving it again says what is wrong
