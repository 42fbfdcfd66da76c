"""Where the active rows of a layer lie, as a kernel on a GPU reads it, at an address that outlives the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from act_serve.kernels.rows import AbilityRows, ActiveRows
from act_serve.kernels.to_device import copy_in_order

# Columns of the table. They are even in number, so that each layer's part starts at a multiple of 16 bytes where layers
# lie side by side; Triton asks that of every address: else it compiles once more.
ROWS, DELTA, BIAS, COUNT, STARTS, MOST, COLUMNS = 0, 1, 2, 3, 4, 5, 6
# Outputs between two of an ability's starts.
RANGE = 2048
# Kernels read rows 16 bytes at a time.
ALIGNMENT = 16


class RowAddresses(Protocol):
    """What a kernel reads of a layer's rows.

    Attributes:
        address_AC: ``[A, 6]`` int64 on the device: addresses of rows, delta, bias (0 for none), the number of rows,
            the address of ``[J + 1]`` int32, how many rows come before each multiple of ``RANGE`` outputs, and the
            most rows that any ability of the table has now. The six lie side by side.
        max_rows: the most rows that one ability can have.
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
        self._starts: Sequence[torch.Tensor] = ()

    def fill(self, active: ActiveRows, out_features: int) -> None:
        """Replaces the rows, with one copy to the device.

        The caller keeps them as long as the table is read. The table does not: where it is kept by them, rows that have
        left would never be freed.

        Raises:
            ValueError: there are more abilities or rows than the table is for, or rows that are not aligned.
        """
        most = max((len(ability.rows_N) for ability in active.abilities), default=0)
        if len(active.abilities) > len(self.address_AC) or most > self.max_rows:
            raise ValueError(
                f"{len(active.abilities)} abilities with up to {most} rows in a table for {len(self.address_AC)} with "
                f"up to {self.max_rows}"
            )
        starts = [started(ability, out_features) for ability in active.abilities]
        host = np.zeros(tuple(self.address_AC.shape), dtype=np.int64)
        for number, (ability, start_J) in enumerate(zip(active.abilities, starts, strict=True)):
            host[number] = entry(ability, start_J)
        host[:, MOST] = most
        copy_in_order(self.address_AC, host)
        # Those that are the abilities' own would keep the rows beside them.
        made = zip(active.abilities, starts, strict=True)
        self._starts = [start_J for ability, start_J in made if ability.start_J is None]


@dataclass(slots=True)
class LayerRows:
    """One layer's part of a :class:`ModelRowTable`; :class:`RowAddresses`.

    Attributes:
        most_rows: the most rows of one ability that the table has now.
    """

    address_AC: torch.Tensor
    max_rows: int
    most_rows: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ModelRows:
    """Where one ability's rows lie in every layer.

    Attributes:
        address_LC: ``[L, 6]`` int64 on the host; the last column is the table's to fill.
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
        starts = [started(*layer) for layer in zip(rows, out_features, strict=True)]
        address_LC = np.zeros((len(rows), COLUMNS), dtype=np.int64)
        for number, layer in enumerate(zip(rows, starts, strict=True)):
            address_LC[number] = entry(*layer)
        return cls(address_LC, (tuple(rows), starts))


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
        self._address_ALC = torch.zeros(abilities, len(out_features), COLUMNS, dtype=torch.int64, device=device)
        self.layers = [
            LayerRows(self._address_ALC[:, number], most_rows) for number, most_rows in enumerate(out_features)
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
            address_ALC = np.stack([rows.address_LC for rows in active])
            most_L = address_ALC[:, :, COUNT].max(axis=0)
            address_ALC[:, :, MOST] = most_L
            for layer, most in zip(self.layers, most_L.tolist(), strict=True):
                layer.most_rows = most
            copy_in_order(self._address_ALC[: len(active)], address_ALC)
        self._kept = tuple(active)


def entry(ability: AbilityRows, start_J: torch.Tensor) -> tuple[int, int, int, int, int, int]:
    """An ability's line of a table, its last column open.

    Raises:
        ValueError: the kernels could not read the rows 16 bytes at a time.
    """
    if ability.delta_NI.data_ptr() % ALIGNMENT or not ability.delta_NI.is_contiguous():
        raise ValueError("the rows of an ability must be contiguous and start at a multiple of 16 bytes")
    bias = 0 if ability.bias_N is None else ability.bias_N.data_ptr()
    return (
        ability.rows_N.data_ptr(), ability.delta_NI.data_ptr(), bias, len(ability.rows_N), start_J.data_ptr(), 0
    )  # fmt: skip


def started(ability: AbilityRows, out_features: int) -> torch.Tensor:
    """The ability's ``start_J``, made where it has none."""
    return starts_of(ability.rows_N, out_features) if ability.start_J is None else ability.start_J


def starts_of(rows_N: torch.Tensor, out_features: int) -> torch.Tensor:
    """``[J + 1]`` int32: how many of the ascending rows come before each multiple of ``RANGE`` outputs.

    J is the number of ranges, so the last one counts all rows.
    """
    edges = torch.arange(count_starts(out_features), dtype=torch.int32, device=rows_N.device) * RANGE
    return torch.searchsorted(rows_N, edges, out_int32=True)


def count_starts(out_features: int) -> int:
    """J + 1 of :func:`starts_of`."""
    return -(-out_features // RANGE) + 1


def table_of(active: ActiveRows, out_features: int, device: torch.device) -> RowTable:
    """A table of just these rows."""
    most = max((len(ability.rows_N) for ability in active.abilities), default=0)
    table = RowTable(device, abilities=len(active.abilities), max_rows=most)
    table.fill(active, out_features)
    return table
