"""Takes the chosen rows of the ability model as differences to the base (arXiv 2601.09398, section 3.2)."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from act_serve.delta.artifact import ModuleDelta
from act_serve.models.row_reader import RowReader, open_rows


def transfer(*, base: Path, source: Path, rows: Mapping[str, Tensor], strength: float) -> dict[str, ModuleDelta]:
    """Returns λ·(W(ability) − W(base)) of the chosen rows, float32, and of their bias entries where there are any.

    Reads only those rows of both checkpoints. Raises ModelError when a tensor is missing.
    """
    with open_rows(base) as left, open_rows(source) as right:
        return {name: _difference(left, right, name, index, strength) for name, index in rows.items()}


def _difference(left: RowReader, right: RowReader, name: str, rows: Tensor, strength: float) -> ModuleDelta:
    wanted = rows.tolist()

    def scaled(ability: Tensor, base: Tensor) -> Tensor:
        return strength * (ability.float() - base.float())

    bias, biases = f"{name}.bias", None
    if bias in left.names():
        biases = scaled(right.rows(bias, wanted), left.rows(bias, wanted))
    return ModuleDelta(rows, scaled(right.channels(name, wanted), left.channels(name, wanted)), biases)
