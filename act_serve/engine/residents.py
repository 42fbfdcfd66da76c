"""The abilities that are in memory, in one order for all layers, under a byte budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from act_serve.delta.artifact import ModuleDelta
from act_serve.delta.composition import WeightedAbility
from act_serve.engine.layers import DeltaLayer
from act_serve.engine.plan import LayerPlan
from act_serve.errors import EngineError

# Applying idle rows (with weight 0) is cheaper than moving rows around, up to this share of the active ones.
_WASTE = 1.5


@dataclass(frozen=True, slots=True, order=True)
class AbilityKey:
    """What is resident: one ability's version, told apart by its content."""

    name: str
    version: int
    digest: str

    @classmethod
    def of(cls, pinned: WeightedAbility) -> AbilityKey:
        """The ability of a pinned composition's part, whatever its weight."""
        return cls(pinned.name, pinned.version or 0, pinned.digest or "")

    def __str__(self) -> str:
        return f"{self.name}@{self.version}~{self.digest}"


class ResidentAbilities:
    """Holds one copy of each resident ability, packed in every layer in the same order.

    The active abilities are kept at the front, so that a layer applies a prefix of its packed rows in one product.

    Args:
        plans, layers: the model's layers, pairwise.
        max_bytes: budget for all residents' tensors; least recently used ones leave first, those in use never.
    """

    def __init__(self, plans: Sequence[LayerPlan], layers: Sequence[DeltaLayer], max_bytes: int) -> None:
        self._plans, self._layers, self._max_bytes = plans, layers, max_bytes
        self._order: list[AbilityKey] = []
        self._bytes: dict[AbilityKey, int] = {}
        self._used: dict[AbilityKey, int] = {}
        self._clock = 0

    def __contains__(self, key: AbilityKey) -> bool:
        return key in self._bytes

    def __len__(self) -> int:
        return len(self._order)

    @property
    def bytes(self) -> int:
        """Bytes of the resident tensors."""
        return sum(self._bytes.values())

    def load(
        self,
        key: AbilityKey,
        modules: Mapping[str, ModuleDelta],
        in_use: Collection[AbilityKey] = (),
        over_budget: bool = False,
    ) -> None:
        """Makes an ability resident; evicts idle ones as far as the budget asks.

        Args:
            key: not resident yet.
            modules: its delta by checkpoint module; each must have been checked to fit.
            in_use: abilities that must stay.
            over_budget: load even where the budget cannot hold it, because a step waits for it.

        Raises:
            EngineError: not every row found its place, or the budget cannot hold it beside those in use.
        """
        segments = [plan.segment(modules) for plan in self._plans]
        expected = sum(m.rows.numel() for m in modules.values()) - self._elsewhere(modules)
        applied = sum(s.rows.numel() for s in segments)
        if applied != expected:
            raise EngineError(f"only {applied} of {expected} rows of ability {key} have a place in this model")
        size = sum(_nbytes(segment, layer) for segment, layer in zip(segments, self._layers, strict=True))
        self._make_room(key, size, in_use, over_budget)
        for layer, segment in zip(self._layers, segments, strict=True):
            layer.pack([*layer.segments, segment])
        self._order.append(key)
        self._bytes[key] = size
        self._touch([key])

    def activate(self, keys: Collection[AbilityKey]) -> list[AbilityKey]:
        """Arranges the packed rows so that a short prefix holds the abilities of this step.

        Args:
            keys: resident abilities that some token of the step uses.

        Returns:
            the prefix, in packed order: all of ``keys``, and idle ones where moving them would cost more.
        """
        self._touch(keys)
        prefix = 1 + max(self._order.index(key) for key in keys)
        active_bytes = sum(self._bytes[key] for key in keys)
        if sum(self._bytes[key] for key in self._order[:prefix]) > _WASTE * active_bytes:
            self._arrange(sorted(keys) + [key for key in self._order if key not in keys])
            prefix = len(keys)
        return self._order[:prefix]

    def evict(self, key: AbilityKey) -> None:
        """Takes an ability out of memory; another copy must be loaded before it can be used again."""
        self._arrange([other for other in self._order if other != key])
        del self._bytes[key], self._used[key]

    def _make_room(self, key: AbilityKey, size: int, in_use: Collection[AbilityKey], over_budget: bool) -> None:
        idle = sorted((k for k in self._order if k not in in_use), key=self._used.__getitem__)
        free = self._max_bytes - self.bytes
        leaving = []
        while size > free and idle:
            leaving.append(idle.pop(0))
            free += self._bytes[leaving[-1]]
        if size > free and not over_budget:
            raise EngineError(
                f"ability {key} needs {size / 2**20:.1f} MiB, but {free / 2**20:.1f} MiB of the budget of "
                f"{self._max_bytes / 2**20:.1f} MiB can be freed; raise max_resident_bytes"
            )
        for old in leaving:
            self.evict(old)

    def _arrange(self, order: list[AbilityKey]) -> None:
        places = [self._order.index(key) for key in order]
        for layer in self._layers:
            layer.pack([layer.segments[place] for place in places])
        self._order = order

    def _touch(self, keys: Collection[AbilityKey]) -> None:
        self._clock += 1
        for key in keys:
            self._used[key] = self._clock

    def _elsewhere(self, modules: Mapping[str, ModuleDelta]) -> int:
        """Rows that other workers have, under tensor parallelism."""
        parts = [part for plan in self._plans for part in plan.parts if part.module in modules]
        return sum(
            row not in part.rows and row < part.shape.out_features
            for part in parts
            if len(part.rows) < part.shape.out_features
            for row in modules[part.module].rows.tolist()
        )


def _nbytes(segment: ModuleDelta, layer: DeltaLayer) -> int:
    values = segment.delta.numel() + (0 if segment.bias_delta is None else segment.bias_delta.numel())
    packed = layer.packed
    return values * packed.delta_NI.element_size() + segment.rows.numel() * packed.rows_N.element_size()
