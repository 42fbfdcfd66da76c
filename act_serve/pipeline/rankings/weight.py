"""How much a row's weights differ, from the checkpoints alone."""

from torch import Tensor

from act_serve.models.row_reader import open_rows
from act_serve.pipeline.rankings.score import Pair


def weight(pair: Pair) -> dict[str, Tensor]:
    """Root mean square of each row's difference, float64 `[O]` per module; one tensor of each model at a time."""
    found = {}
    with open_rows(pair.base) as left, open_rows(pair.source) as right:
        for name in pair.names:
            difference_OI = right.tensor(f"{name}.weight").double() - left.tensor(f"{name}.weight").double()
            found[name] = difference_OI.square().mean(1).sqrt()
    return found
