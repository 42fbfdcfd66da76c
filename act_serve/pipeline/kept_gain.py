"""How much of the ability model's gain over the base a delta keeps on held-out examples."""

from collections.abc import Collection, Mapping

from act_serve.pipeline.measured import Interval, Measured, combined, difference
from act_serve.pipeline.scorers import HIGHER_IS_BETTER

# A share of the gain with its confidence interval.
Kept = tuple[float, Interval]


def kept_gain(base: Measured, source: Measured, delta: Measured) -> Kept | None:
    """(delta - base) / (source - base), with its interval; None where the ability model is no better than the base."""
    gain = source.score - base.score
    if gain == 0 or (gain > 0) != HIGHER_IS_BETTER[base.metric]:
        return None
    return combined(lambda low, high, found: (found - low) / (high - low), base, source, delta)


def gain_shows(base: Measured, source: Measured) -> bool:
    """Whether the examples tell the ability model from the base: else a share of its gain says nothing."""
    _, (low, high) = difference(source, base)
    return not low <= 0 <= high


def lost_gain(kept: Mapping[str, Kept | None], wanted: float, shown: Collection[str]) -> tuple[list[str], bool]:
    """Says for each task that keeps less than the share `wanted` how much it keeps, and whether chance may explain all.

    A share whose interval reaches `wanted`, or of a gain that is not `shown`, may have been missed by the draw of the
    examples alone.
    """
    missed = {task: share for task, share in kept.items() if share is not None and not share[0] >= wanted}
    said = [f"{task} keeps {value:.0%} [{low:.0%}, {high:.0%}]" for task, (value, (low, high)) in missed.items()]
    return said, all(task not in shown or high >= wanted for task, (_, (_, high)) in missed.items())
