"""How much a row's weights differ in units of the row's own size, from the checkpoints alone."""

import torch
from torch import Tensor

from act_serve.models.row_reader import open_rows, weight_names
from act_serve.pipeline.rankings.score import Pair
from act_serve.pipeline.rankings.weight import row_differences


def weight_channel_relative(pair: Pair) -> dict[str, Tensor]:
    """Each row's difference over the row of the base, both as root mean squares; float64 `[O]` per module."""
    return {name: row_differences(pair, name) / _sizes(pair, name) for name in pair.names}


def _sizes(pair: Pair, name: str) -> Tensor:
    with open_rows(pair.base, weight_names(name)) as base:
        found = base.matrix(name).double().square_().mean(1).sqrt()
    return found.clamp_min(torch.finfo(torch.float64).tiny)
