"""Finding 3: moving only the chosen channels moves the ability (arXiv 2601.09398, section 3.2)."""

from collections.abc import Mapping
from dataclasses import dataclass

CHOSEN, CHOSEN_TUNED = "chosen rows", "chosen rows, fine-tuned"
RANDOM, RANDOM_TUNED = "random rows", "random rows, fine-tuned"


@dataclass(frozen=True, slots=True)
class Sufficiency:
    """Score of one task against p, with the base and the ability model as the ends of the scale.

    `curves`: for each way to use the rows (`CHOSEN`, ...), pairs (p, score), ascending. All on `items` examples.
    """

    ability: str
    task: str
    metric: str
    higher_is_better: bool
    items: int
    base: float
    source: float
    curves: Mapping[str, tuple[tuple[float, float], ...]]

    def kept(self, score: float) -> float | None:
        """Share of the way from base to source that `score` has gone; None where the source gains nothing."""
        gain = self.source - self.base
        if gain == 0 or (gain > 0) != self.higher_is_better:
            return None
        return (score - self.base) / gain

    def kept_at(self, curve: str, p: float) -> float | None:
        """`kept` of the point of a curve at p; None where it was not measured."""
        return next((self.kept(score) for at, score in self.curves.get(curve, ()) if at == p), None)


def smallest_sufficient(record: Sufficiency, share: float) -> tuple[float, str] | None:
    """The smallest p, and the curve it lies on, at which the chosen rows keep `share` of the source's gain."""
    good = [
        (p, curve)
        for curve in (CHOSEN, CHOSEN_TUNED)
        for p, score in record.curves.get(curve, ())
        if (kept := record.kept(score)) is not None and kept >= share
    ]
    return min(good) if good else None


def curve(points: Mapping[float, float]) -> tuple[tuple[float, float], ...]:
    """Points of a curve in the order of p."""
    return tuple(sorted(points.items()))
