"""One linear module's share of a PEFT adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from act_serve.errors import ModelError, PairMismatchError
from act_serve.models.families import ChannelModule


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """What an adapter holds for one module.

    Attributes:
        folder, config: the adapter's folder, for messages, and its adapter_config.json.
        module: the base's module; `biased`: whether it has a bias there.
        parts: tensors by the end of their names, such as `lora_A.weight`.
    """

    folder: Path
    config: Mapping[str, Any]
    module: ChannelModule
    biased: bool
    parts: Mapping[str, Tensor]

    def tensor(self, part: str, *shape: int) -> Tensor:
        """The tensor `part` in float32.

        Raises ModelError when there is none, PairMismatchError when its shape is another one.
        """
        if part not in self.parts:
            raise ModelError(f"{self.folder} is damaged: {self.module.name} has no {part}")
        found = self.parts[part]
        if tuple(found.shape) != shape:
            raise PairMismatchError(
                f"{self.folder}: {part} of {self.module.name} has shape {tuple(found.shape)}, not {shape} as its "
                f"config and the base ask ({self.module.out_features} x {self.module.in_features}); is it damaged, or "
                "an adapter for another model?"
            )
        return found.float()
