"""Where the active rows of a layer lie, as a kernel on a GPU reads it, at an address that outlives the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from act_serve.kernels.rows import AbilityRows, ActiveRows
from act_serve.kernels.to_device import copy_in_order

# Columns of the table.
ROWS, DELTA, BIAS, COUNT, PLACES, COLUMNS = 0, 1, 2, 3, 4, 5
# One column more where layers lie side by side, so that each starts at a multiple of 16 bytes, which Triton asks of
# every address: else it compiles once more.
_PITCH = COLUMNS + 1
# Kernels read rows 16 bytes at a time.
ALIGNMENT = 16


class RowAddresses(Protocol):
    """What a kernel reads of a layer's rows.

    Attributes:
        address_AC: ``[A, 5]`` int64 on the device: addresses of rows, delta, bias (0 for none), the number of rows,
            and the address of ``[O]`` int32, the row of each column or -1. The five lie side by side.
        max_rows: the most rows of one ability.
    """

    @property
    def address_AC(self) -> torch.Tensor: ...

    @property
    def max_rows(self) -> int: ...


class RowTable:
    """The addresses of up to A abilities' rows in one layer, in a buffer on the device that never moves.

    Args:
        device: where the rows lie.
        abilities: the most abilities, A.
        max_rows: the most rows of one ability.

    Attributes:
        address_AC: as :class:`RowAddresses`'.
    """

    def __init__(self, device: torch.device, *, abilities: int, max_rows: int) -> None:
        self.max_rows = max_rows
        self.address_AC = torch.zeros(abilities, COLUMNS, dtype=torch.int64, device=device)
        self._kept: tuple[object, ...] = ()

    def fill(self, active: ActiveRows, out_features: int) -> None:
        """Replaces the rows, with one copy to the device; they live at least until the next call.

        Raises:
            ValueError: there are more abilities or rows than the table is for, or rows that are not aligned.
        """
        most = max((len(ability.rows_N) for ability in active.abilities), default=0)
        if len(active.abilities) > len(self.address_AC) or most > self.max_rows:
            raise ValueError(
                f"{len(active.abilities)} abilities with up to {most} rows in a table for {len(self.address_AC)} with "
                f"up to {self.max_rows}"
            )
        places = [placed(ability, out_features) for ability in active.abilities]
        host = np.zeros(tuple(self.address_AC.shape), dtype=np.int64)
        for number, (ability, place_O) in enumerate(zip(active.abilities, places, strict=True)):
            host[number] = entry(ability, place_O)
        copy_in_order(self.address_AC, host)
        self._kept = (active, places)


@dataclass(frozen=True, slots=True)
class LayerRows:
    """One layer's part of a :class:`ModelRowTable`; :class:`RowAddresses`."""

    address_AC: torch.Tensor
    max_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class ModelRows:
    """Where one ability's rows lie in every layer.

    Attributes:
        address_LC: ``[L, 6]`` int64 on the host; the last column is padding.
        kept: what lies there.
    """

    address_LC: np.ndarray
    kept: object

    @classmethod
    def of(cls, rows: Sequence[AbilityRows], out_features: Sequence[int]) -> ModelRows:
        """The rows of an ability in L layers with so many outputs each.

        Raises:
            ValueError: rows that are not aligned.
        """
        places = [placed(*layer) for layer in zip(rows, out_features, strict=True)]
        address_LC = np.zeros((len(rows), _PITCH), dtype=np.int64)
        for number, layer in enumerate(zip(rows, places, strict=True)):
            address_LC[number, :COLUMNS] = entry(*layer)
        return cls(address_LC, (tuple(rows), places))


class ModelRowTable:
    """The addresses of up to A abilities' rows in all L layers, in one buffer on the device that never moves.

    The abilities are the first dimension, so that those of a step lie in one piece: any change is one copy of no more
    than what is in use.

    Args:
        device: where the rows lie.
        abilities: the most abilities, A.
        out_features: outputs of each layer, which are the most rows of an ability there.

    Attributes:
        layers: the part of each layer.
    """

    def __init__(self, device: torch.device, *, abilities: int, out_features: Sequence[int]) -> None:
        self._address_ALC = torch.zeros(abilities, len(out_features), _PITCH, dtype=torch.int64, device=device)
        self.layers = [
            LayerRows(self._address_ALC[:, number, :COLUMNS], most_rows)
            for number, most_rows in enumerate(out_features)
        ]
        self._kept: tuple[ModelRows, ...] = ()

    def fill(self, active: Sequence[ModelRows]) -> None:
        """Replaces the abilities; their rows live at least until the next call.

        Raises:
            ValueError: there are more abilities than the table is for.
        """
        if len(active) > len(self._address_ALC):
            raise ValueError(f"{len(active)} abilities in a table for {len(self._address_ALC)}")
        if active:
            copy_in_order(self._address_ALC[: len(active)], np.stack([rows.address_LC for rows in active]))
        self._kept = tuple(active)


def entry(ability: AbilityRows, place_O: torch.Tensor) -> tuple[int, int, int, int, int]:
    """An ability's line of a table.

    Raises:
        ValueError: the kernels could not read the rows 16 bytes at a time.
    """
    if ability.delta_NI.data_ptr() % ALIGNMENT or not ability.delta_NI.is_contiguous():
        raise ValueError("the rows of an ability must be contiguous and start at a multiple of 16 bytes")
    bias = 0 if ability.bias_N is None else ability.bias_N.data_ptr()
    return ability.rows_N.data_ptr(), ability.delta_NI.data_ptr(), bias, len(ability.rows_N), place_O.data_ptr()


def placed(ability: AbilityRows, out_features: int) -> torch.Tensor:
    """The ability's ``place_O``, made where it has none."""
    return places_of(ability.rows_N, out_features) if ability.place_O is None else ability.place_O


def places_of(rows_N: torch.Tensor, out_features: int) -> torch.Tensor:
    """``[O]`` int32: which row changes each column; -1 where none does."""
    place_O = torch.full((out_features,), -1, dtype=torch.int32, device=rows_N.device)
    place_O[rows_N.long()] = torch.arange(len(rows_N), dtype=torch.int32, device=rows_N.device)
    return place_O


def table_of(active: ActiveRows, out_features: int, device: torch.device) -> RowTable:
    """A table of just these rows."""
    most = max((len(ability.rows_N) for ability in active.abilities), default=0)
    table = RowTable(device, abilities=len(active.abilities), max_rows=most)
    table.fill(active, out_features)
    return table
