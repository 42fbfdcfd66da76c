"""A score with its confidence interval, by resampling the items that it was measured on.

Shapes: N items, S numbers of each (see `scorers.py`), R resamples.
"""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_serve.pipeline.scorers import score_of

Floats = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES = 1000
LEVEL = 0.95
# So many counts are 64-bit numbers at once; all of those of 20,000 items would take 160 MB, twice. Slices are of one
# size, a multiple of 8, and not small: OpenBLAS sums what is left over and small products in other orders, and the last
# bits of a result would depend on the slices.
_COUNTS_AT_ONCE = 3 << 20
_SLICES = (1, 5, 25, 125)


@dataclass(frozen=True, slots=True)
class Measured:
    """One task's result: `items_NS` holds every item's numbers, in the examples' order."""

    metric: str
    items_NS: list[list[float]]

    @property
    def score(self) -> float:
        """The score over all items."""
        return score_of(self.metric, np.sum(self.items_NS, axis=0).tolist())

    @property
    def interval(self) -> Interval:
        """The score's 95 % confidence interval: percentiles of 1,000 resamples of the items, always the same ones."""
        return _percentiles(_resampled(self))

    def as_json(self) -> dict[str, Any]:
        """For files that others read: score, interval and number of items."""
        low, high = self.interval
        return {"score": self.score, "low": low, "high": high, "items": len(self.items_NS)}


def combined(figure: Callable[..., Any], *results: Measured) -> tuple[float, Interval]:
    """`figure` of the scores of results on the same items, with the interval of the paired bootstrap.

    All results of a resample have the same items, so that what makes an item hard for all cancels out. `figure` is
    arithmetic that numpy arrays can do as well; resamples without a finite value are left out.
    """
    if len({len(result.items_NS) for result in results}) != 1:
        raise ValueError(f"results on {[len(result.items_NS) for result in results]} items can't be paired")
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = figure(*map(_resampled, results))
    return float(figure(*(result.score for result in results))), _percentiles(resampled[np.isfinite(resampled)])


def difference(left: Measured, right: Measured) -> tuple[float, Interval]:
    """`left` minus `right`, by the paired bootstrap of `combined`."""
    return combined(operator.sub, left, right)


def _resampled(measured: Measured) -> Floats:
    """The score of every resample, `[R]`."""
    items_NS = np.asarray(measured.items_NS)
    counts_RN = _counts(len(items_NS))
    return np.array(
        [
            score_of(measured.metric, sums)
            for rows in _slices(len(items_NS))
            for sums in (counts_RN[rows].astype(np.float64) @ items_NS).tolist()
        ]
    )


@lru_cache(maxsize=8)
def _counts(items: int) -> NDArray[np.unsignedinteger[Any]]:
    """How often each of N items is drawn in each resample, `[R, N]`, in the smallest dtype that holds N."""
    draw, shares = np.random.default_rng(0), [1 / items] * items
    counts_RN = np.empty((RESAMPLES, items), np.min_scalar_type(items))
    for rows in _slices(items):  # one after the other, they are what a single call draws
        counts_RN[rows] = draw.multinomial(items, shares, size=rows.stop - rows.start)
    return counts_RN


def _slices(items: int) -> Iterator[slice]:
    """The R resamples of N items, in order, some at a time."""
    fitting = (RESAMPLES // count for count in _SLICES if RESAMPLES // count * items <= _COUNTS_AT_ONCE)
    size = next(fitting, RESAMPLES // _SLICES[-1])
    return (slice(start, start + size) for start in range(0, RESAMPLES, size))


def _percentiles(values_R: Floats) -> Interval:
    if not len(values_R):
        return math.nan, math.nan
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high
