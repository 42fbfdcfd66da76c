"""Which tokens of this step use which ability with which weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from act_serve.engine.ability_key import AbilityKey
from act_serve.kernels.rows import TokenWeights


@dataclass(slots=True)
class BatchTable:
    """The weights of one step, shared by all layers and replaced before every step.

    Attributes:
        abilities: the A abilities that some token uses; the same object as long as they stay the same.
        weights: of every token on each of them; None when no token uses any.
    """

    abilities: tuple[AbilityKey, ...] = ()
    weights: TokenWeights | None = None

    def clear(self) -> None:
        """No token of the step uses an ability."""
        self.weights = None

    def fill(self, ids_T: Sequence[int], compositions: Mapping[int, Mapping[AbilityKey, float]]) -> None:
        """Sets the step's weights.

        Args:
            ids_T: adapter id of each token, 0 for the base model.
            compositions: per adapter id in the batch, its abilities' weights.
        """
        abilities = tuple(sorted({key for weights in compositions.values() for key in weights}))
        if abilities != self.abilities:
            self.abilities = abilities
        ids, inverse_T = np.unique(np.asarray(ids_T, dtype=np.int64), return_inverse=True)
        table = np.zeros((len(ids), len(abilities)), dtype=np.float32)
        for row, adapter_id in enumerate(ids.tolist()):
            of = compositions.get(adapter_id, {})
            table[row] = [of.get(key, 0.0) for key in self.abilities]
        self.weights = TokenWeights(table[inverse_T])
