"""The rows of several abilities, one after the other: what the kernels work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of A abilities of one layer.

    Attributes:
        delta_NI: ``[N, I]``, the dtype of the layer's activations.
        rows_N: ``[N]`` int64 in ``[0, O)``, unique per ability.
        counts: rows of each ability, A numbers that sum to N; the owner of row n follows from them.
        bias_N: ``[N]``, same dtype as ``delta_NI``, or None.
    """

    delta_NI: torch.Tensor
    rows_N: torch.Tensor
    counts: tuple[int, ...]
    bias_N: torch.Tensor | None = None

    def prefix(self, abilities: int) -> PackedRows:
        """Views of the first abilities' rows."""
        counts = self.counts[:abilities]
        n = sum(counts)
        return PackedRows(self.delta_NI[:n], self.rows_N[:n], counts, None if self.bias_N is None else self.bias_N[:n])

    def products(self, x_TI: torch.Tensor) -> torch.Tensor:
        """``x · delta + bias``, ``[T, N]``: accumulated in fp32, rounded once to the dtype of ``x_TI``."""
        delta_IN = self.delta_NI.t()
        return torch.mm(x_TI, delta_IN) if self.bias_N is None else torch.addmm(self.bias_N, x_TI, delta_IN)
