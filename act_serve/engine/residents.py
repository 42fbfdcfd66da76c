"""The abilities that are in memory, under a byte budget."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from act_serve.delta.artifact import ModuleDelta
from act_serve.delta.channels import Kind, kind_of
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.layers import DeltaLayer
from act_serve.engine.plan import LayerPlan
from act_serve.engine.row_memory import RowMemory, SpareMemory, rounded_up
from act_serve.errors import EngineError
from act_serve.kernels.row_table import count_starts, starts_of
from act_serve.kernels.rows import AbilityRows

# A larger ability takes longer than a step, whether its memory is ready or not.
_MOST_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class PreparedAbility:
    """An ability that can become resident.

    Attributes:
        rows: in every layer, as the kernels take them.
        kinds: of the channels that it changes, on any worker: all must agree on how a step runs.
    """

    rows: list[AbilityRows]
    kinds: frozenset[Kind]


class ResidentAbilities:
    """Holds one copy of each resident ability, its rows beside the layers that they belong to.

    Loading has two parts: :meth:`prepare` does the work and may run in another thread; :meth:`install` makes the
    ability visible to the layers and takes microseconds, so it can happen between two steps.

    Args:
        plans, layers: the model's layers, pairwise.
        device: where the layers run.
        max_bytes: budget for all residents' tensors; least recently used ones leave first, those in use never.
        other_stages: the modules that other pipeline stages have.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        layers: Sequence[DeltaLayer],
        device: torch.device,
        max_bytes: int,
        other_stages: Collection[str] = (),
    ) -> None:
        self._plans, self._layers, self._device, self._max_bytes = plans, layers, device, max_bytes
        self._other_stages = frozenset(other_stages)
        self._bytes: dict[AbilityKey, int] = {}  # least recently used first
        self._kinds: dict[AbilityKey, frozenset[Kind]] = {}
        # A stream that no step runs on, so that a load waits for none.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spare = SpareMemory(_MOST_SPARE_BYTES if device.type == "cpu" else 0)

    def __contains__(self, key: AbilityKey) -> bool:
        return key in self._bytes

    def __iter__(self) -> Iterator[AbilityKey]:
        return iter(self._bytes)

    def __len__(self) -> int:
        return len(self._bytes)

    @property
    def bytes(self) -> int:
        """Bytes of the resident tensors."""
        return sum(self._bytes.values())

    def prepare(self, key: AbilityKey, modules: Mapping[str, ModuleDelta]) -> PreparedAbility:
        """Copies an ability's rows to where the layers are.

        Args:
            modules: its delta by checkpoint module; each must have been checked to fit.

        Raises:
            EngineError: not every row found its place.
        """
        memory = self._spare.take(self._most_bytes(modules))
        segments = [plan.segment(modules, memory) for plan in self._plans]
        expected = sum(m.rows.numel() for m in modules.values()) - self._elsewhere(modules)
        applied = sum(s.rows.numel() for s in segments)
        if applied != expected:
            raise EngineError(f"only {applied} of {expected} rows of ability {key} have a place in this model")
        rows = [
            AbilityRows(segment.rows, segment.delta, segment.bias_delta, self._starts(plan, segment.rows, memory))
            for plan, segment in zip(self._plans, segments, strict=True)
        ]
        memory.shrink(0)
        if self._device.type != "cpu":
            rows = self._on_device(rows, memory)
        return PreparedAbility(rows, frozenset(kind_of(name) for name, module in modules.items() if len(module.rows)))

    def prepare_memory(self) -> None:
        """Makes memory ready for one more ability like the last one; in the thread that calls :meth:`prepare`."""
        self._spare.renew()

    def install(
        self,
        key: AbilityKey,
        prepared: PreparedAbility,
        in_use: Collection[AbilityKey] = (),
        over_budget: bool = False,
    ) -> None:
        """Makes an ability resident; evicts idle ones as far as the budget asks, unless it is to be over it.

        Args:
            key: not resident yet.
            in_use: abilities that must stay.
            over_budget: whatever the budget says, and nothing leaves: a step waits, or who asks keeps the budget.

        Raises:
            EngineError: the budget cannot hold it beside those in use.
        """
        size = sum(rows.nbytes for rows in prepared.rows)
        if not over_budget:
            self._make_room(key, size, in_use)
        for layer, rows in zip(self._layers, prepared.rows, strict=True):
            layer.resident[key] = rows
        self._bytes[key], self._kinds[key] = size, prepared.kinds

    def touch(self, keys: Collection[AbilityKey]) -> None:
        """Notes that the coming step uses these resident abilities."""
        for key in keys:
            self._bytes[key] = self._bytes.pop(key)

    def change(self, kinds: Collection[Kind], keys: Collection[AbilityKey]) -> bool:
        """Whether one of these resident abilities changes channels of these kinds, on any worker."""
        return any(not self._kinds[key].isdisjoint(kinds) for key in keys)

    def evict(self, key: AbilityKey) -> None:
        """Takes an ability out of memory; it must be loaded again before it can be used."""
        if self._device.type == "cuda":
            # A step that has been launched may still read the rows, and the next load would write in their place.
            torch.cuda.synchronize(self._device)
        for layer in self._layers:
            layer.forget(key)
        del self._bytes[key], self._kinds[key]

    def _most_bytes(self, modules: Mapping[str, ModuleDelta]) -> int:
        """What an ability's rows take at most on this worker."""
        total = 0
        for plan in self._plans:
            count = sum(len(modules[part.module].rows) for part in plan.parts if part.module in modules)
            size = plan.dtype.itemsize
            total += rounded_up(4 * count) + rounded_up(size * count * plan.width) + rounded_up(size * count)
            total += rounded_up(4 * count_starts(plan.out_features))
        return total

    def _starts(self, plan: LayerPlan, rows: torch.Tensor, memory: RowMemory) -> torch.Tensor | None:
        if self._device.type != "cuda" or plan.kind not in ("linear", "lm_head"):
            return None
        # Made here and copied: a kernel that this thread launches may not have ended when a step reads what it writes.
        starts = starts_of(rows, plan.out_features)
        return memory.empty(starts.shape, starts.dtype).copy_(starts)

    def _on_device(self, rows: Sequence[AbilityRows], memory: RowMemory) -> list[AbilityRows]:
        with torch.cuda.stream(self._copies):
            copied = memory.copy_to(self._device)
        if self._copies is not None:
            self._copies.synchronize()
        return [
            AbilityRows(
                copied(ability.rows_N),
                copied(ability.delta_NI),
                None if ability.bias_N is None else copied(ability.bias_N),
                None if ability.start_J is None else copied(ability.start_J),
            )
            for ability in rows
        ]

    def _make_room(self, key: AbilityKey, size: int, in_use: Collection[AbilityKey]) -> None:
        idle = [other for other in self._bytes if other not in in_use]
        free = self._max_bytes - self.bytes
        leaving = []
        while size > free and idle:
            leaving.append(idle.pop(0))
            free += self._bytes[leaving[-1]]
        if size > free:
            raise EngineError(
                f"ability {key} needs {size / 2**20:.1f} MiB, but {free / 2**20:.1f} MiB of the budget of "
                f"{self._max_bytes / 2**20:.1f} MiB can be freed; raise max_resident_bytes"
            )
        for old in leaving:
            self.evict(old)

    def _elsewhere(self, modules: Mapping[str, ModuleDelta]) -> int:
        """Rows that other workers have, under tensor and pipeline parallelism."""
        stages = sum(modules[name].rows.numel() for name in self._other_stages & modules.keys())
        parts = [part for plan in self._plans for part in plan.parts if part.module in modules]
        return stages + sum(
            row not in part.rows and row < part.shape.out_features
            for part in parts
            if len(part.rows) < part.shape.out_features
            for row in modules[part.module].rows.tolist()
        )
