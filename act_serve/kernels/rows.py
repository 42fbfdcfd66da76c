"""What the kernels work on: the rows of the active abilities, and which token uses which of them.

Shapes: T tokens, A abilities, N rows of one ability, I input and O output features, P tokens that use one ability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

# From so many tokens of one ability on, one matrix product for them beats single dot products.
MANY = 48


@dataclass(frozen=True, slots=True, eq=False)
class AbilityRows:
    """One ability's rows of one layer.

    Attributes:
        rows_N: ``[N]`` int32 in ``[0, O)``, ascending, unique.
        delta_NI: ``[N, I]`` contiguous, the dtype of the layer's activations.
        bias_N: ``[N]``, same dtype, or None.
        start_J: ``[J + 1]`` int32, rows before each range of outputs, for the form on GPUs (which else makes it); or
            None. See :func:`act_serve.kernels.row_table.starts_of`.
    """

    rows_N: torch.Tensor
    delta_NI: torch.Tensor
    bias_N: torch.Tensor | None = None
    start_J: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        parts = (self.rows_N, self.delta_NI, self.bias_N, self.start_J)
        return sum(part.nbytes for part in parts if part is not None)

    def products(self, x_PI: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``x · delta + bias``, ``[P, N]``: accumulated in fp32, rounded once to the dtype of ``x_PI``.

        Args:
            out: ``[P, N]`` memory to put them in.
        """
        delta_IN = self.delta_NI.t()
        if self.bias_N is None:
            return torch.mm(x_PI, delta_IN, out=out)
        return torch.addmm(self.bias_N, x_PI, delta_IN, out=out)


@dataclass(frozen=True, slots=True, eq=False)
class NativeCall:
    """What compiled code is told of a layer and a step beside its activations; the same in many steps.

    Attributes:
        weights: the step's.
        table: ``[8]`` int64, ``struct Call`` of add_rows.cpp, or None where it has nothing to do; ``address``: where
            it lies, 0 for None.
    """

    weights: TokenWeights
    table: np.ndarray | None
    address: int


class ActiveRows:
    """The rows that the step's A abilities have in one layer, in the order of the weights' columns.

    Attributes:
        call: of the last step, for :mod:`act_serve.kernels.native`.
    """

    def __init__(self, abilities: Sequence[AbilityRows]) -> None:
        self.abilities = tuple(abilities)
        self.call: NativeCall | None = None

    @cached_property
    def table(self) -> np.ndarray:
        """``[A, 4]`` int64 for compiled code: addresses of rows, delta and bias (0 for none), and N."""
        return np.array(
            [
                (
                    a.rows_N.data_ptr(),
                    a.delta_NI.data_ptr(),
                    0 if a.bias_N is None else a.bias_N.data_ptr(),
                    len(a.rows_N),
                )
                for a in self.abilities
            ],
            dtype=np.int64,
        ).reshape(-1, 4)

    @cached_property
    def address(self) -> int:
        """Where ``table`` lies."""
        return int(self.table.ctypes.data)


@dataclass(frozen=True, slots=True, eq=False)
class Uses:
    """The tokens that use one ability, ascending, with their weights: ``[P]`` int32 and fp32."""

    tokens_P: np.ndarray
    weight_P: np.ndarray

    @property
    def run(self) -> slice | None:
        """The tokens as a slice, where they follow one another, as those of one prompt do."""
        first, last = int(self.tokens_P[0]), int(self.tokens_P[-1])
        return slice(first, last + 1) if last - first + 1 == len(self.tokens_P) else None


@dataclass(frozen=True, slots=True, eq=False)
class FlatUses:
    """The uses of A abilities one after the other, for compiled code.

    Attributes:
        starts: ``[A + 1]`` int32, where each ability's begin.
        tokens, weights: int32 and fp32.
        addresses: where the three lie.
    """

    starts: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray
    addresses: tuple[int, int, int]

    @classmethod
    def of(cls, uses: Sequence[Uses | None]) -> FlatUses | None:
        """None when there are none; an ability whose uses are None has none."""
        counts = [0 if use is None else len(use.tokens_P) for use in uses]
        if not any(counts):
            return None
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        tokens, weights = zip(*((use.tokens_P, use.weight_P) for use in uses if use is not None), strict=True)
        parts = (starts, np.concatenate(tokens), np.concatenate(weights))
        return cls(*parts, addresses=(parts[0].ctypes.data, parts[1].ctypes.data, parts[2].ctypes.data))


class TokenWeights:
    """The weights of one step, shared by all layers.

    Args:
        weight_TA: ``[T, A]`` fp32; 0 where a token does not use an ability. Tokens beyond T are padding and use none.
    """

    def __init__(self, weight_TA: np.ndarray) -> None:
        self.weight_TA = np.ascontiguousarray(weight_TA, dtype=np.float32)
        self._on: dict[torch.device, tuple[tuple[torch.Tensor, torch.Tensor], ...]] = {}

    @cached_property
    def uses(self) -> tuple[Uses, ...]:
        """Per ability, who uses it."""
        found = []
        for weight_T in self.weight_TA.T:
            tokens_P = np.flatnonzero(weight_T).astype(np.int32)
            found.append(Uses(tokens_P, np.ascontiguousarray(weight_T[tokens_P])))
        return tuple(found)

    def on(self, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """``uses`` as tensors on a device, moved there once for all layers: ``[P]`` int64 and ``[P, 1]`` fp32."""
        if device not in self._on:
            self._on[device] = tuple(
                (
                    torch.from_numpy(use.tokens_P).long().to(device),
                    torch.from_numpy(use.weight_P).to(device)[:, None],
                )
                for use in self.uses
            )
        return self._on[device]

    @cached_property
    def many(self) -> tuple[tuple[int, Uses], ...]:
        """Abilities, by their number, that at least ``MANY`` tokens use."""
        return tuple((number, use) for number, use in enumerate(self.uses) if len(use.tokens_P) >= MANY)

    @cached_property
    def few(self) -> FlatUses | None:
        """The uses of all other abilities; None when there are none."""
        return FlatUses.of([use if len(use.tokens_P) < MANY else None for use in self.uses])

    @cached_property
    def every(self) -> FlatUses | None:
        """The uses of all abilities; None when there are none."""
        return FlatUses.of(self.uses)
