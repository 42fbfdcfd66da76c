"""How much a channel's own weights change its output, upstream changes left out."""

from torch import Tensor

from act_serve.models.activations import row_effects
from act_serve.models.loading import load_model
from act_serve.models.row_reader import open_rows
from act_serve.pipeline.rankings.score import Pair


def activation_weight(pair: Pair) -> dict[str, Tensor]:
    """Mean of |ΔW_i·x| over the answer tokens, float64 `[O]` per module; x is the base's input to the module."""
    base = load_model(pair.base)
    with open_rows(pair.source) as source:

        def difference(name: str) -> Tensor:
            weight: Tensor = base.get_submodule(name).weight
            return source.tensor(f"{name}.weight").to(weight.device).float() - weight.float()

        return row_effects(base, pair.batches(), pair.names, difference)
