"""How much a row's weights differ, from the checkpoints alone."""

from torch import Tensor

from act_serve.models.row_reader import open_rows
from act_serve.pipeline.rankings.score import Pair


def weight(pair: Pair) -> dict[str, Tensor]:
    """Root mean square of each row's difference, float64 `[O]` per module; one tensor of each model at a time."""
    return {name: _difference(pair, f"{name}.weight") for name in pair.names}


def _difference(pair: Pair, name: str) -> Tensor:
    # Opened for one tensor, so that the pages of those read before don't stay mapped.
    with open_rows(pair.base, [name]) as base, open_rows(pair.source, [name]) as source:
        return source.tensor(name).double().sub_(base.tensor(name)).square_().mean(1).sqrt()
