"""Which rows of a foreign weight change an ability keeps, and how much of the change that is.

Shapes: O channels of a module, I inputs, K kept rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from act_serve.delta.artifact import ModuleDelta, as_stored
from act_serve.delta.manifest import Import, Stored
from act_serve.errors import DataError, ModelError
from act_serve.models.families import ChannelModule

# A change that leaves half of the weights alone is row-sparse, and kept whole unless a smaller budget is asked for.
ROW_SPARSE = 0.5
DEFAULT_BUDGET = 0.05

Change = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Given:
    """What is imported.

    Attributes:
        form: as in the manifest.
        changes: per module a function that makes its change, float32 weight `[O, I]` and bias `[O]` or None; called
            twice, so that one module's matrix is in memory at a time.
        left_out: number of other tensors that differ.
    """

    form: Literal["checkpoint", "lora", "shira"]
    changes: Mapping[str, Callable[[], Change]]
    left_out: int = 0


def keep_rows(
    given: Given, modules: Sequence[ChannelModule], stored: Stored, p: float | None = None
) -> tuple[dict[str, ModuleDelta], Import]:
    """Returns the deltas and what to say about them.

    `p` is the budget as a share of the parameters of `modules`. Within it every changed row is kept; above it, the
    rows with the largest mean square, which lose the least of the change's norm for their parameters. Without `p`, a
    change of at most half of the parameters is kept whole, and of another 5 %. Raises ModelError when a change holds
    NaN, DataError when there is none or the budget holds no row.
    """
    squares = {name: _squares(name, *make()) for name, make in given.changes.items()}
    squares = {name: square_O for name, square_O in squares.items() if square_O.any()}
    if not squares:
        raise DataError("nothing to import: no row of the base's linear modules changes")
    widths = {module.name: module.in_features for module in modules}
    linear = sum(module.out_features * module.in_features for module in modules)
    changed = sum(int(square_O.count_nonzero()) * widths[name] for name, square_O in squares.items())
    if p is None:
        p = 1.0 if changed <= ROW_SPARSE * linear else DEFAULT_BUDGET
    kept = _largest(squares, widths, p * linear)
    deltas = {name: _rows(given.changes[name], rows) for name, rows in kept.items() if len(rows)}
    if not deltas:
        raise DataError(f"p = {p:g} of the linear parameters holds no row; raise it")
    lost = sum(float(square_O.sum()) for square_O in squares.values())
    total = lost
    for name, rows in kept.items():
        lost -= float(squares[name][rows.long()].sum())
    lost = max(lost, 0.0) + _rounding(deltas, stored)
    exact = sum(len(rows) for rows in kept.values()) == sum(int(s.count_nonzero()) for s in squares.values())
    error = float(f"{math.sqrt(lost / total):.4g}")
    return deltas, Import(form=given.form, exact=exact, relative_error=error, left_out=given.left_out)


def _squares(name: str, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    square_O = weight_OI.double().square().sum(dim=1)
    if bias_O is not None:
        square_O += bias_O.double().square()
    if not bool(torch.isfinite(square_O).all()):
        raise ModelError(f"the change of {name} holds NaN or infinity; the source is damaged")
    return square_O


def _largest(squares: Mapping[str, Tensor], widths: Mapping[str, int], budget: float) -> dict[str, Tensor]:
    """The rows to keep, ascending int32 `[K]` per module, by mean square, within the budget in parameters."""
    sizes = torch.cat([torch.full((len(square_O),), widths[name]) for name, square_O in squares.items()])
    scores = torch.cat([square_O / widths[name] for name, square_O in squares.items()])
    ranked = scores.argsort(descending=True, stable=True)
    ranked = ranked[scores[ranked] > 0]
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[ranked[sizes[ranked].cumsum(0) <= budget]] = True
    parts = chosen.split([len(square_O) for square_O in squares.values()])
    return {name: part.nonzero().flatten().int() for name, part in zip(squares, parts, strict=True)}


def _rows(make: Callable[[], Change], rows: Tensor) -> ModuleDelta:
    weight_OI, bias_O = make()
    index = rows.long()
    return ModuleDelta(rows, weight_OI[index], None if bias_O is None else bias_O[index])


def _rounding(deltas: Mapping[str, ModuleDelta], stored: Stored) -> float:
    """Sum of squares of what the stored form loses."""
    lost = 0.0
    for name, module in as_stored(deltas, stored).items():
        lost += float((module.delta.double() - deltas[name].delta.double()).square().sum())
        if (bias := deltas[name].bias_delta) is not None and module.bias_delta is not None:
            lost += float((module.bias_delta.double() - bias.double()).square().sum())
    return lost
