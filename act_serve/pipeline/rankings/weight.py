"""How much a row's weights differ, from the checkpoints alone."""

import torch
from torch import Tensor

from act_serve.models.row_reader import open_rows, weight_names
from act_serve.pipeline.rankings.score import Pair


def weight(pair: Pair) -> dict[str, Tensor]:
    """Root mean square of each row's difference, float64 `[O]` per module; one tensor of each model at a time."""
    # All made before the first large tensor comes and goes: among those, they would leave gaps that those don't fit in.
    found = {name: torch.empty(count, dtype=torch.float64) for name, count in pair.channels.items()}
    for name, score_O in found.items():
        score_O.copy_(row_differences(pair, name))
    return found


def row_differences(pair: Pair, name: str) -> Tensor:
    """Root mean square of the difference of each of a module's rows, float64 `[O]`."""
    # Opened for one tensor, so that the pages of those read before don't stay mapped.
    tensors = weight_names(name)
    with open_rows(pair.base, tensors) as base, open_rows(pair.source, tensors) as source:
        return source.matrix(name).double().sub_(base.matrix(name)).square_().mean(1).sqrt()
