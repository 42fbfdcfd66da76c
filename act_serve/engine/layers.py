"""The delta layer: adds the active abilities' rows to the output of one of vLLM's layers.

vLLM's linear layers call ``layer.quant_method.apply(layer, x, bias)`` on their own shard, quantised or not, before
any tensor-parallel reduction (vllm/model_executor/layers/linear.py); wrapping that method is the whole seam. The
logits processor does so with lm_head, and the embedding calls ``quant_method.embedding`` on its shard. Norms have no
such method: their ``forward`` is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.batch import BatchTable
from act_serve.engine.plan import LayerPlan
from act_serve.errors import EngineError
from act_serve.kernels.dispatch import AddRows
from act_serve.kernels.rows import AbilityRows, ActiveRows
from act_serve.kernels.torch_impl import add_columns_torch, add_scales_torch

# The compiled graph holds a layer's name, and the op finds the layer here when it runs.
_LAYERS: dict[str, DeltaLayer] = {}


class DeltaLayer:
    """The resident rows of one vLLM layer, by ability.

    Args:
        name: the layer's name in vLLM's model.
        batch: the step's table, shared by all layers.
        add_rows: the kernel, such as from :func:`act_serve.kernels.dispatch.choose_add_rows`.

    Attributes:
        resident: the rows of each resident ability, one copy; rows are those of the layer's (fused, local) output.
    """

    def __init__(self, name: str, batch: BatchTable, add_rows: AddRows) -> None:
        self.name, self.batch, self._add_rows = name, batch, add_rows
        self.resident: dict[AbilityKey, AbilityRows] = {}
        self._abilities: tuple[AbilityKey, ...] = ()
        self._active, self._any_rows = ActiveRows(()), False
        _LAYERS[name] = self

    def add(self, x_TI: torch.Tensor, y_TO: torch.Tensor) -> None:
        """Adds the active abilities' weighted rows to ``y_TO`` in place.

        Args:
            x_TI: ``[T, I]``, the layer's input, of the embedding the token ids ``[T]``, of a norm what is normalised.
            y_TO: ``[T, O]``, the layer's output.
        """
        weights = self.batch.weights
        if weights is not None and self._changes():
            check_whole(self.name, x_TI, len(weights.weight_TA))
            self._add_rows(x_TI, y_TO, self._active, weights)

    def _changes(self) -> bool:
        """Whether the step's abilities have rows in this layer."""
        if self._abilities is not self.batch.abilities:
            self._abilities = self.batch.abilities
            self._active = ActiveRows([self.resident[key] for key in self._abilities])
            self._any_rows = any(len(ability.rows_N) for ability in self._active.abilities)
        return self._any_rows

    def forget(self, key: AbilityKey) -> None:
        """Drops an ability's rows."""
        del self.resident[key]
        if key in self._abilities:  # else the tensors would live on here
            self._abilities, self._active, self._any_rows = (), ActiveRows(()), False


def check_whole(layer: str, x_TI: torch.Tensor, tokens: int) -> None:
    """Refuses an input that is a part of the step's tokens: it would get the rows of others, and kernels read past it.

    Raises:
        EngineError: the layer sees fewer tokens than the step has.
    """
    if len(x_TI) < tokens:
        raise EngineError(
            f"{layer} was called with {len(x_TI)} of the {tokens} tokens of a step, so it is not known whose they are; "
            "turn off what splits steps (sequence parallelism, microbatches)"
        )


class HeadLayer(DeltaLayer):
    """The resident rows of lm_head, whose input are not the step's tokens but the positions that are sampled from.

    Logits of prompt positions stay the base's, so nothing that changes lm_head may ask for them: the server's app
    refuses that (engine/app.py), and vLLM's own serves no such ability (engine/resolver.py).
    """

    def add(self, x_TI: torch.Tensor, y_TO: torch.Tensor) -> None:
        """As :meth:`DeltaLayer.add`, at the step's first call.

        Raises:
            EngineError: there are not as many positions as vLLM has announced, so it is not known whose they are.
        """
        if self.batch.weights is None or not self._changes():
            return
        weights = self.batch.take_sampled()
        if weights is None:
            return
        if len(x_TI) != len(weights.weight_TA):
            raise EngineError(
                f"vLLM computes logits of {len(x_TI)} positions and announced {len(weights.weight_TA)}, so rows of "
                "lm_head can't be added; serve abilities without them on this version of vLLM"
            )
        self._add_rows(x_TI, y_TO, self._active, weights)


def attach(
    plan: LayerPlan, batch: BatchTable, add_rows: AddRows, make_linear: Callable[..., DeltaLayer] = DeltaLayer
) -> DeltaLayer:
    """Puts a delta layer behind a layer of vLLM's, and returns it.

    Args:
        batch: the step's table, shared by all layers.
        add_rows: the kernel of linear layers and of lm_head.
        make_linear: makes the delta layer of a linear layer, with the arguments of :class:`DeltaLayer`.
    """
    module = plan.layer
    if plan.kind == "norms":
        layer = DeltaLayer(plan.name, batch, partial(add_scales_torch, eps=module.variance_epsilon))
        module.forward = _with_scales(module.forward, layer)
    elif plan.kind == "embedding":
        layer = DeltaLayer(plan.name, batch, add_columns_torch)
        module.quant_method = DeltaEmbeddingMethod(module.quant_method, layer)
        module.use_fused_embedding = False  # a kernel of GPUs under tensor parallelism, which calls no method
    else:
        layer = (HeadLayer if plan.kind == "lm_head" else make_linear)(plan.name, batch, add_rows)
        module.quant_method = DeltaLinearMethod(module.quant_method, layer)
    return layer


class _DeltaMethod(QuantizeMethodBase):
    """A method of a vLLM layer that adds a delta layer's rows; everything else is the wrapped method's.

    It is one of vLLM's, which prepares the weights of these alone when it reads them again (``reload_weights``).
    """

    def __init__(self, wrapped: Any, layer: DeltaLayer) -> None:
        self.wrapped, self.delta_layer = wrapped, layer
        self.layer_name = layer.name
        for name in ("requires_device_loading", "uses_meta_device", "supports_pre_processed_weights"):
            if hasattr(wrapped, name):
                setattr(self, name, getattr(wrapped, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> Any:
        """The wrapped method's."""
        return self.wrapped.create_weights(layer, *weight_args, **extra_weight_attrs)

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The wrapped method's."""
        result: torch.Tensor = self.wrapped.apply(layer, *args, **kwargs)
        return result

    def embedding(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The wrapped method's."""
        result: torch.Tensor = self.wrapped.embedding(layer, *args, **kwargs)
        return result

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> Any:
        """The wrapped method's."""
        return self.wrapped.tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The wrapped method's."""
        self.wrapped.process_weights_after_loading(layer)

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """The wrapped method's."""
        weight: torch.Tensor = self.wrapped.dequantize_weight(layer)
        return weight


class DeltaEmbeddingMethod(_DeltaMethod):
    """A vLLM embedding method that adds the delta layer's columns to what the wrapped method looks up."""

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """As vLLM's ``UnquantizedEmbeddingMethod.embedding``; the result includes the step's abilities."""
        y: torch.Tensor = self.wrapped.embedding(layer, input_)
        if torch.compiler.is_compiling():
            _add_in_graph(input_.view(-1), _tokens(y), self.layer_name)
        elif self.delta_layer.batch.weights is not None:
            self.delta_layer.add(input_.view(-1), _tokens(y))
        return y


def _with_scales(forward: Callable[..., Any], layer: DeltaLayer) -> Callable[..., Any]:
    """vLLM's ``RMSNorm.forward`` with the delta layer's scales added to what it returns; compiled code has none."""

    def forward_with_scales(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        done = forward(x, residual)
        # With a residual, what is normalised is the sum, which comes back as the second value.
        y, normalised = (done, x) if residual is None else done
        if not torch.compiler.is_compiling() and layer.batch.weights is not None:
            layer.add(normalised, y)
        return done

    return forward_with_scales


class DeltaLinearMethod(_DeltaMethod):
    """A vLLM linear method that adds the delta layer's rows to what the wrapped method computes."""

    def __init__(self, wrapped: Any, layer: DeltaLayer) -> None:
        super().__init__(wrapped, layer)
        self.wrapped_apply: Callable[..., torch.Tensor] = wrapped.apply

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As vLLM's ``LinearMethodBase.apply``; the result includes the step's abilities."""
        y = self.wrapped_apply(layer, x, bias)
        if torch.compiler.is_compiling():
            _add_in_graph(_tokens(x), _tokens(y), self.layer_name)
        elif self.delta_layer.batch.weights is not None:
            self.delta_layer.add(_tokens(x), _tokens(y))
        return y


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """``[T, I]`` of what may be ``[1, T, I]``, as in vLLM's Transformers backend; the same memory."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


_rows_in_graphs = True


def _add_in_graph(x: torch.Tensor, y: torch.Tensor, layer: str) -> None:
    """Puts the operator into the graph that the compiler is making."""
    if _rows_in_graphs:
        torch.ops.act_serve.add_ability_rows(x, y, layer)


@contextmanager
def left_out_of_graphs() -> Iterator[None]:
    """Graphs that are made meanwhile are those of the model without abilities."""
    global _rows_in_graphs
    _rows_in_graphs = False
    try:
        yield
    finally:
        _rows_in_graphs = True


def add_ability_rows(x: torch.Tensor, y: torch.Tensor, layer: str) -> None:
    """:meth:`DeltaLayer.add` as an operator that torch.compile keeps whole."""
    _LAYERS[layer].add(x, y)


def _shapes_only(x: torch.Tensor, y: torch.Tensor, layer: str) -> None:
    """What the operator returns, for the compiler."""


# The operator lives as long as this.
_LIBRARY = torch.library.Library("act_serve", "FRAGMENT")
direct_register_custom_op(
    "add_ability_rows", add_ability_rows, mutates_args=["y"], fake_impl=_shapes_only, target_lib=_LIBRARY
)
_OPERATOR = torch.ops.act_serve.add_ability_rows.default
_dispatched = _OPERATOR._op


def _without_dispatcher(x: torch.Tensor, y: torch.Tensor, layer: str) -> None:
    if type(y) is torch.Tensor:
        _LAYERS[layer].add(x, y)
    else:  # the compiler's own tensors
        _dispatched(x, y, layer)


# Compiled code calls this once per layer in every step with abilities. Each layer's weights push torch's dispatcher out
# of the cache, and an empty call through it then takes 24 us; without it, 6 (an Intel Xeon; a step of SmolLM2-135M has
# 121). `_op` is what `OpOverload.__call__` calls.
_OPERATOR._op = _without_dispatcher
