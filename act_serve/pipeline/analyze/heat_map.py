"""Where in the model an ability lies: layer by module."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from act_serve.models.families import PROJECTIONS, layer_and_projection
from act_serve.pipeline.analyze.overlap import Mask


@dataclass(frozen=True, slots=True)
class HeatMap:
    """By projection and layer: the mean Δa of a module's channels, and the share of them in the mask at `p`."""

    ability: str
    ranking: str
    p: float
    differences: Mapping[str, Mapping[int, float]]
    mask_shares: Mapping[str, Mapping[int, float]]


def heat_map(ability: str, differences: Mapping[str, Tensor], mask: Mask, *, ranking: str, p: float) -> HeatMap:
    """Sums up Δa, `[O]` per module name, and a mask over the same modules."""
    means = {name: float(values.mean()) for name, values in differences.items()}
    shares = {name: len(mask[name]) / len(values) if name in mask else 0.0 for name, values in differences.items()}
    return HeatMap(ability, ranking, p, _grid(means), _grid(shares))


def _grid(values: Mapping[str, float]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        # What lies in no layer comes first in a line of its own, as in the pictures of `act-serve inspect`.
        outside = ".layers." not in name
        layer, projection = (0, name.rpartition(".")[2]) if outside else layer_and_projection(name)
        found.setdefault(projection, {})[layer] = value
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(projection: str) -> tuple[int, str]:
    """The modules' order in a layer; others come last."""
    order = [name.rsplit(".", 1)[-1] for name in PROJECTIONS]
    return (order.index(projection) if projection in order else len(order), projection)
