"""The control: rows chosen by chance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from act_serve.models.families import ChannelModule
from act_serve.pipeline.rankings.score import Pair
from act_serve.pipeline.rankings.weight import row_differences


def random_rows(pair: Pair) -> dict[str, Tensor]:
    """Uniform random scores `[O]` per module, the same for the same seed; all 0 where the models don't differ."""
    if not any(row_differences(pair, name).any() for name in pair.names):
        return {name: torch.zeros(count) for name, count in pair.channels.items()}
    return draw_scores(pair.modules, pair.seed)


def draw_scores(modules: Sequence[ChannelModule], seed: int) -> dict[str, Tensor]:
    """Uniform random scores `[O]` per module."""
    draw = torch.Generator().manual_seed(seed)
    return {module.name: torch.rand(module.out_features, generator=draw) for module in modules}
