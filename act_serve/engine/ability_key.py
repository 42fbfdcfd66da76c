"""What is resident: one ability's version, told apart by its content."""

from __future__ import annotations

from dataclasses import dataclass

from act_serve.delta.composition import WeightedAbility


@dataclass(frozen=True, slots=True, order=True)
class AbilityKey:
    """Name, version and content digest of an ability."""

    name: str
    version: int
    digest: str

    @classmethod
    def of(cls, pinned: WeightedAbility) -> AbilityKey:
        """The ability of a pinned composition's part, whatever its weight."""
        return cls(pinned.name, pinned.version or 0, pinned.digest or "")

    def __str__(self) -> str:
        return f"{self.name}@{self.version}~{self.digest}"
