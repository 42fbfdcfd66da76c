"""How much a channel's own weights change its output, upstream changes left out."""

from torch import Tensor

from act_serve.models.activations import row_effects
from act_serve.models.row_reader import open_rows
from act_serve.pipeline.rankings.score import Pair


def activation_weight(pair: Pair) -> dict[str, Tensor]:
    """Mean of |ΔW_i·x| over the answer tokens, float64 `[O]` per module; x is the base's input to the module."""
    batches = pair.batches()

    def difference(name: str) -> Tensor:
        weight = f"{name}.weight"
        with open_rows(pair.base, [weight]) as base, open_rows(pair.source, [weight]) as source:
            return source.tensor(weight).float().sub_(base.tensor(weight))

    return row_effects(batches, pair.watch(batches, pair.base, inputs=True), pair.channels, difference)
