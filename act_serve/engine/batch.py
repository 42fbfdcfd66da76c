"""Which tokens of this step use which ability with which weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(slots=True)
class BatchTable:
    """The weights of one step, shared by all layers and replaced before every step.

    Attributes:
        device: where the layers run.
        active: number of packed abilities that the layers must apply, A; 0 means that no token uses any.
        weight_TA: ``[T, A]`` fp32; 0 where the token does not use the ability.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    active: int = 0
    weight_TA: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def clear(self) -> None:
        """No token of this step uses an ability."""
        self.active = 0

    def fill(self, ids_T: Sequence[int], weights: Mapping[int, Sequence[float]], active: int) -> None:
        """Sets the step's weights.

        Args:
            ids_T: adapter id of each token, 0 for the base model.
            weights: per adapter id in the batch, its weight on each of the ``active`` packed abilities.
            active: A.
        """
        ids, inverse_T = np.unique(np.asarray(ids_T, dtype=np.int64), return_inverse=True)
        table = np.zeros((len(ids), active), dtype=np.float32)
        for row, adapter_id in enumerate(ids):
            if adapter_id in weights:
                table[row] = weights[int(adapter_id)]
        self.weight_TA = torch.from_numpy(table[inverse_T]).to(self.device)
        self.active = active
