"""Δa in units of the channel's own activation: how much of what the channel says has changed."""

import torch
from torch import Tensor

from act_serve.models.activations import activation_differences, activation_means
from act_serve.pipeline.rankings.score import Pair


def activation_channel_relative(pair: Pair) -> dict[str, Tensor]:
    """Δa divided by the channel's own mean of |a(base)|, float64 `[O]` per module.

    Channels that are nearly silent in the base come first.
    """
    batches = pair.batches()
    scales = activation_means(batches, pair.watch(batches, pair.base), pair.channels)
    differences = activation_differences(batches, pair.watch(batches, pair.base, pair.source), pair.channels)
    tiny = torch.finfo(torch.float64).tiny
    return {name: found / scales[name].clamp_min(tiny) for name, found in differences.items()}
