"""Where the active rows of a layer lie, as a kernel on a GPU reads it, at an address that outlives the step."""

from __future__ import annotations

import torch

from act_serve.kernels.rows import ActiveRows

# Columns of the table.
ROWS, DELTA, BIAS, COUNT, PLACES, COLUMNS = 0, 1, 2, 3, 4, 5
# Kernels read rows 16 bytes at a time.
ALIGNMENT = 16


class RowTable:
    """The addresses of up to A abilities' rows in one layer, in a buffer on the device that never moves.

    Args:
        device: where the rows lie.
        abilities: the most abilities, A.
        max_rows: the most rows of one ability.

    Attributes:
        address_AC: ``[A, 5]`` int64: addresses of rows, delta, bias (0 for none), the number of rows, and the address
            of ``[O]`` int32, the row of each column or -1.
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
        places = [
            places_of(ability.rows_N, out_features) if ability.place_O is None else ability.place_O
            for ability in active.abilities
        ]
        host = torch.zeros(self.address_AC.shape, dtype=torch.int64)
        for number, (ability, place_O) in enumerate(zip(active.abilities, places, strict=True)):
            if ability.delta_NI.data_ptr() % ALIGNMENT or not ability.delta_NI.is_contiguous():
                raise ValueError(f"the rows of ability {number} must be contiguous and start at a multiple of 16 bytes")
            bias = 0 if ability.bias_N is None else ability.bias_N.data_ptr()
            host[number] = torch.tensor(
                [ability.rows_N.data_ptr(), ability.delta_NI.data_ptr(), bias, len(ability.rows_N), place_O.data_ptr()]
            )
        self.address_AC.copy_(host)
        self._kept = (active, places)


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
