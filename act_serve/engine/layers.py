"""The delta layer: adds the active abilities' rows to the output of one of vLLM's linear layers.

vLLM's linear layers call ``layer.quant_method.apply(layer, x, bias)`` on their own shard, quantised or not, before
any tensor-parallel reduction (vllm/model_executor/layers/linear.py); wrapping that method is the whole seam.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from act_serve.delta.artifact import ModuleDelta
from act_serve.engine.batch import BatchTable
from act_serve.kernels.dispatch import AddRows
from act_serve.kernels.packed import PackedRows

# The compiled graph holds a layer's name, and the op finds the layer here when it runs.
_LAYERS: dict[str, DeltaLayer] = {}


class DeltaLayer:
    """The resident rows of one vLLM layer, packed one ability after the other.

    There is one copy of every ability: what an ability's segment holds is a view into the packed tensors.

    Args:
        name: the layer's name in vLLM's model.
        batch: the step's table, shared by all layers.
        in_features: I of this worker's shard.
        add_rows: the kernel, from :func:`act_serve.kernels.dispatch.choose_add_rows`.
    """

    def __init__(self, name: str, batch: BatchTable, in_features: int, like: torch.Tensor, add_rows: AddRows) -> None:
        self.name, self.batch, self._add_rows = name, batch, add_rows
        self.segments: list[ModuleDelta] = []
        rows_N = torch.zeros(0, dtype=torch.int64, device=like.device)
        self.packed = PackedRows(like.new_zeros(0, in_features), rows_N, ())
        self._active = self.packed
        _LAYERS[name] = self

    def pack(self, segments: Sequence[ModuleDelta]) -> None:
        """Lays the abilities' rows out in this order; rows are those of the layer's (fused, local) output."""
        rows_N, delta_NI = self.packed.rows_N[:0].clone(), self.packed.delta_NI[:0].clone()
        bias_N = None
        if segments:
            rows_N = torch.cat([s.rows for s in segments]).to(rows_N)
            delta_NI = torch.cat([s.delta for s in segments]).to(delta_NI)
            if any(s.bias_delta is not None for s in segments):
                bias_N = torch.cat([_bias(s) for s in segments]).to(delta_NI)
        self.packed = PackedRows(delta_NI, rows_N, tuple(s.rows.numel() for s in segments), bias_N)
        self._active = self.packed
        self.segments, start = [], 0
        for count in self.packed.counts:
            part = slice(start, start := start + count)
            self.segments.append(ModuleDelta(rows_N[part], delta_NI[part], None if bias_N is None else bias_N[part]))

    def add(self, x_TI: torch.Tensor, y_TO: torch.Tensor) -> None:
        """Adds the active abilities' weighted rows to ``y_TO`` in place.

        Args:
            x_TI: ``[T, I]``, the layer's input; y_TO: ``[T, O]``, the layer's output.
        """
        active = self.batch.active
        if len(self._active.counts) != active:
            self._active = self.packed.prefix(active)
        if active and self._active.rows_N.numel():
            self._add_rows(x_TI, y_TO, self._active, self.batch.weight_TA)


def _bias(segment: ModuleDelta) -> torch.Tensor:
    return segment.delta.new_zeros(len(segment.rows)) if segment.bias_delta is None else segment.bias_delta


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
        elif self.delta_layer.batch.active:
            self.delta_layer.add(x, y)
        return y


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "act_serve::add_ability_rows", mutates_args=("y",)
)
def add_ability_rows(x: torch.Tensor, y: torch.Tensor, layer: str) -> None:
    """:meth:`DeltaLayer.add` as an operator that torch.compile keeps whole."""
    _LAYERS[layer].add(x, y)


@add_ability_rows.register_fake  # type: ignore[untyped-decorator]
def _(x: torch.Tensor, y: torch.Tensor, layer: str) -> None:
    return None
