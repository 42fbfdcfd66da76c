"""Abilities inside CUDA graphs: tables that are filled before a step, and layers whose launches never change.

A graph replays the kernels of its capture with the arguments of then. Here these are buffers that never move, so a
step changes what they hold, outside the graph, and nothing else. What vLLM 0.32 does around this, in both of its model
runners:

* It tells the manager of a step's adapters before the forward pass, on the stream that graphs are replayed on:
  ``_prepare_inputs`` in V1 (vllm/v1/worker/gpu_model_runner.py), ``execute_model`` in V2
  (vllm/v1/worker/gpu/model_runner.py).
* It captures every size with adapters and without (``_get_lora_cases``, vllm/v1/cudagraph_dispatcher.py;
  ``get_lora_capture_cases``, vllm/v1/worker/gpu/lora_utils.py), tells the manager of made-up adapters before a capture
  with them (``maybe_select_dummy_loras``, vllm/v1/worker/lora_model_runner_mixin.py) and of none before one without,
  and replays the graph without only when no request of the step has an adapter. So a step without adapters launches
  nothing here, and one with made-up adapters launches kernels that find nothing to do.
* It runs the same sizes once outside a graph before it captures them, in which Triton compiles
  (``_warmup_and_capture`` in V1, ``CudaGraphManager.capture`` in V2).

In piecewise graphs the operator lies inside the captured pieces. As one of ``splitting_ops`` it would cut a layer into
five pieces instead of two, and be launched from Python four times per layer; it has no need of either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.batch import BatchTable
from act_serve.engine.graph_limits import GraphLimits
from act_serve.engine.layers import DeltaLayer, check_whole
from act_serve.errors import EngineError
from act_serve.kernels import step_table
from act_serve.kernels.dispatch import AddRows, graph_form
from act_serve.kernels.row_table import LayerRows, ModelRows, ModelRowTable
from act_serve.kernels.rows import TokenWeights
from act_serve.kernels.step_table import GRAPH_BLOCK, StepTable

_OF_NOBODY = TokenWeights(np.zeros((0, 0), dtype=np.float32))


class GraphTables:
    """The step's uses and all layers' rows where the kernels read them, in graphs and outside.

    Args:
        limits: the largest step that a graph may hold.

    Attributes:
        step: of steps that fit a graph; it never moves.
        long_step: of the present step, where it does not fit.
    """

    step: StepTable
    long_step: StepTable

    def __init__(self, limits: GraphLimits) -> None:
        self._limits = limits
        self._idle = True
        self._layers: Sequence[GraphDeltaLayer] = ()
        self._out_features: Sequence[int] = ()
        self._rows: ModelRowTable
        self._abilities: tuple[AbilityKey, ...] = ()  # the batch's, whose rows the table has
        self._known: dict[AbilityKey, ModelRows] = {}

    def serve(self, device: torch.device, layers: Sequence[GraphDeltaLayer], out_features: Sequence[int]) -> None:
        """Makes the tables; they never move from then on.

        Args:
            device: where the layers run.
            layers: all of the model's; each gets its part of the table of rows.
            out_features: how many outputs each has.
        """
        limits, self._device = self._limits, device
        self.step = StepTable(
            device,
            tokens=limits.tokens,
            abilities=limits.abilities,
            uses_per_token=limits.abilities_per_request,
            block=GRAPH_BLOCK,
        )
        self._rows = ModelRowTable(device, abilities=limits.abilities, out_features=out_features)
        for layer, rows in zip(layers, self._rows.layers, strict=True):
            layer.rows = rows
        self._layers, self._out_features = layers, out_features

    def prepare_made_up(self, batch: BatchTable) -> None:
        """As :meth:`prepare`, for adapters that don't exist: layers launch their kernels, no token uses anything."""
        batch.abilities, batch.weights = (), _OF_NOBODY
        self.clear()

    def prepare(self, batch: BatchTable) -> None:
        """Brings the tables to the batch's step; call it before the forward pass, outside any graph.

        Args:
            batch: the step, which every layer reads, too.

        Raises:
            EngineError: the step has more abilities than its limits say.
        """
        weights = batch.weights
        if weights is None or not weights.weight_TA.size:
            self.clear()
            return
        try:
            if self._abilities is not batch.abilities:
                self._fill_rows(batch.abilities)
            if len(weights.weight_TA) > self._limits.tokens:
                self.clear()
                self.long_step = step_table.table_of(weights, self._device)
                return
            self.step.fill(weights)
        except ValueError as exc:  # admission and the manager let no step through that is too large
            raise EngineError(f"the step does not fit the tables of the CUDA graphs: {exc}") from exc
        self._idle = False

    def clear(self) -> None:
        """No token uses an ability: a graph that ran now would change nothing."""
        if not self._idle:
            self.step.fill(None)
            self._idle = True

    def reset(self) -> None:
        """As :meth:`clear`, whatever the buffers hold: vLLM's sleep mode may have dropped what is in them."""
        self.step.fill(None)
        self._rows.fill(())
        self._idle, self._abilities = True, ()

    def forget(self, key: AbilityKey) -> None:
        """Drops an ability's rows, which no step may use from now on."""
        self._known.pop(key, None)
        if key in self._abilities:  # else its tensors would live on here
            self.reset()

    def _fill_rows(self, abilities: tuple[AbilityKey, ...]) -> None:
        for key in abilities:
            if key not in self._known:
                self._known[key] = ModelRows.of([layer.resident[key] for layer in self._layers], self._out_features)
        self._rows.fill([self._known[key] for key in abilities])
        self._abilities = abilities


class GraphDeltaLayer(DeltaLayer):
    """A delta layer whose launches can be captured.

    Args:
        name, batch, add_rows: as :class:`DeltaLayer`'s.
        tables: shared by all layers; ``tables.serve`` gives this one its rows.

    Raises:
        EngineError: the kernel cannot run inside CUDA graphs.
    """

    rows: LayerRows

    def __init__(self, name: str, batch: BatchTable, add_rows: AddRows, tables: GraphTables) -> None:
        super().__init__(name, batch, add_rows)
        form = graph_form(add_rows)
        if form is None:
            raise EngineError(
                "abilities run inside CUDA graphs only with the Triton kernel, which this GPU does not run (the log "
                "says why); start vLLM with --enforce-eager"
            )
        self._tables, self._add_rows_from = tables, form

    def add(self, x_TI: torch.Tensor, y_TO: torch.Tensor) -> None:
        """As :meth:`DeltaLayer.add`.

        All layers read the same tables, also in steps that no graph holds: tables of each layer's own would have to be
        made anew whenever the abilities of the steps change.
        """
        weights = self.batch.weights
        if weights is None:
            return
        tokens, step = len(weights.weight_TA), self._tables.step
        check_whole(self.name, x_TI, tokens)
        if tokens <= len(x_TI) <= step.tokens:
            self._add_rows_from(x_TI, y_TO, self.rows, step, None)
        elif x_TI.is_cuda and torch.cuda.is_current_stream_capturing():
            raise EngineError(f"{self.name}: a CUDA graph of {len(x_TI)} tokens, where at most {step.tokens} are known")
        elif weights.weight_TA.size:
            step = step if tokens <= step.tokens else self._tables.long_step
            self._add_rows_from(x_TI[:tokens], y_TO[:tokens], self.rows, step, self.rows.most_rows)

    def forget(self, key: AbilityKey) -> None:
        """As :meth:`DeltaLayer.forget`."""
        super().forget(key)
        self._tables.forget(key)
