"""Δa: how differently the two models activate a channel (arXiv 2601.09398, equation 1)."""

from torch import Tensor

from act_serve.models.activations import activation_differences
from act_serve.models.loading import load_model
from act_serve.pipeline.rankings.score import Pair


def activation(pair: Pair) -> dict[str, Tensor]:
    """Mean of |a(source) − a(base)| over the answer tokens, float64 `[O]` per module."""
    return activation_differences(load_model(pair.base), load_model(pair.source), pair.batches(), pair.names)
