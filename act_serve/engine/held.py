"""What one engine holds of an ability, as it tells the router."""

from __future__ import annotations

from dataclasses import dataclass

# Under a path that clients cannot reach through the router.
HELD_PATH = "/act-serve/abilities"


@dataclass(frozen=True, slots=True)
class Held:
    """One version's content in one engine.

    Attributes:
        version, digest: which it is.
        requests: those in flight that use it.
        waiting: those that wait until it has been loaded.
        resident_bytes: what it takes in memory; 0 is not resident.
        leaving: whether it makes room for others once its requests have ended.
    """

    version: int
    digest: str
    requests: int = 0
    waiting: int = 0
    resident_bytes: int = 0
    leaving: bool = False
