"""How much two abilities get in each other's way: the rows that both change, and whether they agree on them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from act_serve.delta.artifact import ModuleDelta


def conflict(left: Mapping[str, ModuleDelta], right: Mapping[str, ModuleDelta]) -> dict[str, Any]:
    """Returns the rows that both change and how alike the changes are, in total and by module, ready for JSON.

    `rows`: number of shared rows; `share`: of the rows of the smaller ability; `cosine`: mean over the shared rows of
    the cosine between both changes (1: the same direction, 0: unrelated, -1: opposite; None without shared rows).
    `modules` holds the same three for each module that has shared rows.
    """
    modules, cosines = {}, []
    for name in sorted(left.keys() & right.keys()):
        cosine = _cosines(left[name], right[name])
        if len(cosine):
            modules[name] = _figures(cosine, len(left[name].rows), len(right[name].rows))
            cosines.append(cosine)
    every = torch.cat(cosines) if cosines else torch.zeros(0)
    return {**_figures(every, _rows(left), _rows(right)), "modules": modules}


def _cosines(left: ModuleDelta, right: ModuleDelta) -> torch.Tensor:
    """One cosine per row that both have."""
    rows, counts = torch.cat([left.rows, right.rows]).unique(return_counts=True)
    shared = rows[counts == 2]
    mine, theirs = (side.delta[torch.isin(side.rows, shared)].float() for side in (left, right))
    return cosine_similarity(mine, theirs, dim=1)


def _figures(cosines: torch.Tensor, left_rows: int, right_rows: int) -> dict[str, Any]:
    return {
        "rows": len(cosines),
        "share": round(len(cosines) / min(left_rows, right_rows), 4),
        "cosine": round(float(cosines.mean()), 4) if len(cosines) else None,
    }


def _rows(deltas: Mapping[str, ModuleDelta]) -> int:
    return sum(len(module.rows) for module in deltas.values())
