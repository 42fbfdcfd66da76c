"""Chooses the channels that hold the ability.

Every ranking gets the same budget, `p` of the linear parameters, so that rankings are compared at equal size.
Shapes: O channels of a module, K chosen rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from act_serve.errors import BuildError
from act_serve.models.families import ChannelModule
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.pipeline.rankings.random_rows import draw_scores
from act_serve.profile.schema import Localize


def localize(
    modules: list[ChannelModule], scores: Mapping[str, Tensor], settings: Localize, seed: int
) -> dict[str, Tensor]:
    """Returns the chosen rows, ascending int32 `[K]` per module name; modules without any are left out.

    `scores` holds `[O]` per module, as the ranking's `score` gives it; a random ranking ignores it. Channels of score
    0 are not chosen, however large the budget: by weights, these do not differ. Raises BuildError when the budget is
    too small for a single row.
    """
    if settings.ranking == "random":
        scores = draw_scores(modules, seed)
    if RANKINGS[settings.ranking].per_module:
        rows = {module.name: _top(scores[module.name], round(settings.p * module.out_features)) for module in modules}
    else:
        rows = _top_of_all(modules, scores, settings.p)
    chosen = {name: index for name, index in rows.items() if len(index)}
    if not chosen:
        raise BuildError(f"p = {settings.p} is too small: it leaves no row in any module; raise localize.p")
    return chosen


def _top(scores_O: Tensor, count: int) -> Tensor:
    best = scores_O.topk(min(count, len(scores_O)))
    return best.indices[best.values != 0].sort().values.int()


def _top_of_all(modules: list[ChannelModule], scores: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
    """Takes the best channels of all modules together until their parameters reach the budget."""
    sizes = torch.cat([torch.full((module.out_features,), module.in_features) for module in modules])
    every = torch.cat([scores[module.name].double() for module in modules])
    ranked = every.argsort(descending=True, stable=True)
    within = (sizes[ranked].cumsum(0) <= p * int(sizes.sum())) & (every[ranked] != 0)
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[ranked[within]] = True
    parts = chosen.split([module.out_features for module in modules])
    return {module.name: part.nonzero().flatten().int() for module, part in zip(modules, parts, strict=True)}
