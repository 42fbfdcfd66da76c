"""Deltas on a frozen model, as served, trainable.

Shapes: B items, T tokens, O output channels, I inputs, K rows, U what the module's channels read.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from act_serve.delta.artifact import ModuleDelta
from act_serve.models.channel_products import channel_inputs, products


class RowDeltas:
    """Adds `y_BTO[..., rows_K] += weight · (u_BTU · delta_KIᵀ + bias_K)`, as serving does, to a model's outputs.

    Use `attached` as a context; while `on` is False the deltas are left out, which gives the base model again. The
    deltas are float32 parameters and are rounded to the model's dtype where they are applied.
    """

    def __init__(self, deltas: Mapping[str, ModuleDelta], weight: float = 1.0) -> None:
        self._weight = weight
        self._given = dict(deltas)
        self._rows = {name: delta.rows.long() for name, delta in deltas.items()}
        self._trained = {name: nn.Parameter(delta.delta.float().clone()) for name, delta in deltas.items()}
        self.on = True

    def parameters(self) -> list[nn.Parameter]:
        """The rows' float32 differences, `[K, I]` each."""
        return list(self._trained.values())

    def freeze(self) -> None:
        """The rows are no longer trained."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def export(self) -> dict[str, ModuleDelta]:
        """The deltas as they are now, float32."""
        return {
            name: ModuleDelta(given.rows, self._trained[name].detach().clone(), given.bias_delta)
            for name, given in self._given.items()
        }

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Adds the deltas to the outputs of `model` inside the context."""
        handles = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in self._given]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Leaves the deltas out inside the context."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def _hook(self, name: str) -> Any:
        bias_K = self._given[name].bias_delta

        def add_rows(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.on:
                return output
            delta_KI = self._trained[name].to(output.device, output.dtype)
            bias = None if bias_K is None else bias_K.to(output.device, output.dtype)
            rows_K = self._rows[name].to(output.device)
            added_BTK = products(name, channel_inputs(name, module, inputs[0]), delta_KI, rows_K, bias)
            return torch.index_add(output, -1, rows_K, added_BTK, alpha=self._weight)

        return add_rows
