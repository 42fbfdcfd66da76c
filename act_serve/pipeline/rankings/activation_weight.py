"""How much a channel's own weights change its output, upstream changes left out."""

from torch import Tensor

from act_serve.models.activations import row_effects
from act_serve.models.row_reader import open_rows, weight_names
from act_serve.pipeline.rankings.score import Pair

_ROWS = 512


def activation_weight(pair: Pair) -> dict[str, Tensor]:
    """Mean of |ΔW_i·x| over the answer tokens, float64 `[O]` per module; x is the base's input to the module."""
    batches = pair.batches()

    def difference(name: str) -> Tensor:
        tensors = weight_names(name)
        with open_rows(pair.base, tensors) as base, open_rows(pair.source, tensors) as source:
            change_OI, from_OI = source.matrix(name).float(), base.matrix(name)
            for rows in zip(change_OI.split(_ROWS), from_OI.split(_ROWS), strict=True):
                rows[0].sub_(rows[1])  # torch widens a copy of what is subtracted
            return change_OI

    return row_effects(batches, pair.watch(batches, pair.base, inputs=True), pair.channels, difference)
