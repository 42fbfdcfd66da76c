"""Δa in units of the module's own activation, so that modules of different scale can be compared."""

import torch
from torch import Tensor

from act_serve.models.activations import activation_differences, activation_means
from act_serve.pipeline.rankings.score import Pair


def activation_relative(pair: Pair) -> dict[str, Tensor]:
    """Δa divided by the mean of |a(base)| over the module's channels, float64 `[O]` per module.

    The module's scale is used and not the channel's own, for which nearly silent channels would come first.
    """
    batches = pair.batches()
    scales = activation_means(batches, pair.watch(batches, pair.base), pair.channels)
    differences = activation_differences(batches, pair.watch(batches, pair.base, pair.source), pair.channels)
    tiny = torch.finfo(torch.float64).tiny
    return {name: found / scales[name].mean().clamp_min(tiny) for name, found in differences.items()}
