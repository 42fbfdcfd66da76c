"""The delta layer: adds the active abilities' rows to the output of one of vLLM's linear layers.

vLLM's linear layers call ``layer.quant_method.apply(layer, x, bias)`` on their own shard, quantised or not, before
any tensor-parallel reduction (vllm/model_executor/layers/linear.py); wrapping that method is the whole seam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.batch import BatchTable
from act_serve.kernels.dispatch import AddRows
from act_serve.kernels.rows import AbilityRows, ActiveRows

# The compiled graph holds a layer's name, and the op finds the layer here when it runs.
_LAYERS: dict[str, DeltaLayer] = {}


class DeltaLayer:
    """The resident rows of one vLLM layer, by ability.

    Args:
        name: the layer's name in vLLM's model.
        batch: the step's table, shared by all layers.
        add_rows: the kernel, from :func:`act_serve.kernels.dispatch.choose_add_rows`.

    Attributes:
        resident: the rows of each resident ability, one copy; rows are those of the layer's (fused, local) output.
    """

    def __init__(self, name: str, batch: BatchTable, add_rows: AddRows) -> None:
        self.name, self.batch, self._add_rows = name, batch, add_rows
        self.resident: dict[AbilityKey, AbilityRows] = {}
        self._abilities: tuple[AbilityKey, ...] = ()
        self._active = ActiveRows(())
        _LAYERS[name] = self

    def add(self, x_TI: torch.Tensor, y_TO: torch.Tensor) -> None:
        """Adds the active abilities' weighted rows to ``y_TO`` in place.

        Args:
            x_TI: ``[T, I]``, the layer's input; y_TO: ``[T, O]``, the layer's output.
        """
        weights = self.batch.weights
        if weights is None:
            return
        if self._abilities is not self.batch.abilities:
            self._abilities = self.batch.abilities
            self._active = ActiveRows([self.resident[key] for key in self._abilities])
        self._add_rows(x_TI, y_TO, self._active, weights)

    def forget(self, key: AbilityKey) -> None:
        """Drops an ability's rows."""
        del self.resident[key]
        if key in self._abilities:  # else the tensors would live on here
            self._abilities, self._active = (), ActiveRows(())


class DeltaLinearMethod:
    """A vLLM linear method that adds the delta layer's rows to what the wrapped method computes.

    Everything else is the wrapped method's.
    """

    def __init__(self, wrapped: Any, layer: DeltaLayer) -> None:
        self.wrapped, self.delta_layer = wrapped, layer
        self.layer_name = layer.name
        self.wrapped_apply: Callable[..., torch.Tensor] = wrapped.apply

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As vLLM's ``LinearMethodBase.apply``; the result includes the step's abilities."""
        y = self.wrapped_apply(layer, x, bias)
        if torch.compiler.is_compiling():
            torch.ops.act_serve.add_ability_rows(x, y, self.layer_name)
        elif self.delta_layer.batch.weights is not None:
            self.delta_layer.add(x, y)
        return y


def add_ability_rows(x: torch.Tensor, y: torch.Tensor, layer: str) -> None:
    """:meth:`DeltaLayer.add` as an operator that torch.compile keeps whole."""
    _LAYERS[layer].add(x, y)


def _shapes_only(x: torch.Tensor, y: torch.Tensor, layer: str) -> None:
    """What the operator returns, for the compiler."""


# The operator lives as long as this. vLLM's way to register one calls it without the layers of torch.library.custom_op:
# an empty call takes 2 us instead of 15 (AMD EPYC), and a step has one per layer, whether abilities are active or not.
_LIBRARY = torch.library.Library("act_serve", "FRAGMENT")
direct_register_custom_op(
    "add_ability_rows", add_ability_rows, mutates_args=["y"], fake_impl=_shapes_only, target_lib=_LIBRARY
)
