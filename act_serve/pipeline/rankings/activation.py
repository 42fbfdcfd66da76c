"""Δa: how differently the two models activate a channel (arXiv 2601.09398, equation 1)."""

from torch import Tensor

from act_serve.models.activations import activation_differences
from act_serve.pipeline.rankings.score import Pair


def activation(pair: Pair) -> dict[str, Tensor]:
    """Mean of |a(source) − a(base)| over the answer tokens, float64 `[O]` per module."""
    batches = pair.batches()
    return activation_differences(batches, pair.watch(batches, pair.base, pair.source), pair.channels)
