"""Where a checkpoint module's rows lie in vLLM's layers: fused, and sharded by tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)

from act_serve.delta.artifact import ModuleDelta
from act_serve.delta.fit import ModuleShape


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint module inside a vLLM layer.

    Attributes:
        module: its name in the checkpoint; ``shape``: its whole, unsharded shape.
        rows: which of its rows this worker computes.
        start: where the first of them lies in the layer's local output.
    """

    module: str
    shape: ModuleShape
    rows: range
    start: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """A vLLM layer on this worker.

    Attributes:
        name: in vLLM's model; ``layer``: the module itself.
        parts: the checkpoint modules fused in it, in order.
        columns: the slice of the input features that this worker multiplies.
        adds_bias: whether this worker is the one that adds the bias.
    """

    name: str
    layer: LinearBase
    parts: tuple[Part, ...]
    columns: slice
    adds_bias: bool

    @property
    def width(self) -> int:
        """Number of input features that this worker multiplies, I."""
        return len(range(*self.columns.indices(self.layer.input_size)))

    def segment(self, modules: Mapping[str, ModuleDelta], dtype: torch.dtype) -> ModuleDelta:
        """A copy of an ability's rows in the layer's local output; possibly none.

        Args:
            modules: the ability's delta by checkpoint module, rows ascending.
            dtype: of the copied values; every value is moved and converted once.

        Returns:
            rows ``[k]`` int32, ascending; delta ``[k, I]`` and bias ``[k]`` for the columns and rows of this worker.
        """
        found = []
        for part in self.parts:
            if (module := modules.get(part.module)) is not None:
                bounds = torch.tensor([part.rows.start, part.rows.stop], dtype=module.rows.dtype)
                found.append((part, module, slice(*torch.searchsorted(module.rows, bounds).tolist())))
        count = sum(mine.stop - mine.start for _, _, mine in found)
        rows = torch.empty(count, dtype=torch.int32)
        delta = torch.empty(count, self.width, dtype=dtype)
        biased = self.adds_bias and any(
            module.bias_delta is not None and bool(module.bias_delta[mine].any()) for _, module, mine in found
        )
        bias = torch.zeros(count, dtype=dtype) if biased else None
        end = 0
        for part, module, mine in found:
            here = slice(end, end := end + mine.stop - mine.start)
            # The parts lie one after the other, each with ascending rows, so all are ascending.
            rows[here] = module.rows[mine] + (part.start - part.rows.start)
            delta[here] = module.delta[mine, self.columns]
            if bias is not None and module.bias_delta is not None:
                bias[here] = module.bias_delta[mine]
        return ModuleDelta(rows, delta, bias)


def plan_layers(model: torch.nn.Module) -> list[LayerPlan]:
    """Every linear layer of a vLLM model that delta rows can be added to."""
    fused: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    return [_plan(name, layer, fused) for name, layer in model.named_modules() if isinstance(layer, LinearBase)]


def _plan(name: str, layer: LinearBase, fused: Mapping[str, Sequence[str]]) -> LayerPlan:
    prefix, _, leaf = name.rpartition(".")
    modules = [f"{prefix}.{part}" if prefix else part for part in fused.get(leaf, (leaf,))]
    row_parallel = isinstance(layer, RowParallelLinear)
    tp_rank = getattr(layer, "tp_rank", 0)
    columns = slice(None)
    if row_parallel:
        width = layer.input_size_per_partition
        columns = slice(tp_rank * width, (tp_rank + 1) * width)
    parts, start = [], 0
    for module, (size, local, shard) in zip(modules, _shards(layer), strict=True):
        shape = ModuleShape(size, layer.input_size, layer.bias is not None)
        parts.append(Part(module, shape, range(shard * local, (shard + 1) * local), start))
        start += local
    return LayerPlan(name, layer, tuple(parts), columns, not (row_parallel and tp_rank > 0))


def _shards(layer: LinearBase) -> Iterator[tuple[int, int, int]]:
    """Per fused part: its whole size, its size on this worker, and which shard of it this worker has."""
    tp_rank, tp_size = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
    if isinstance(layer, QKVParallelLinear):
        yield layer.total_num_heads * layer.head_size, layer.num_heads * layer.head_size, tp_rank
        # With fewer kv heads than workers, several workers hold the same head.
        shard = tp_rank // layer.num_kv_head_replicas
        yield layer.total_num_kv_heads * layer.head_size, layer.num_kv_heads * layer.head_size, shard
        yield layer.total_num_kv_heads * layer.v_head_size, layer.num_kv_heads * layer.v_head_size, shard
    elif isinstance(layer, RowParallelLinear):
        yield layer.output_size, layer.output_size, 0
    elif isinstance(layer, ColumnParallelLinear):
        for size in getattr(layer, "output_sizes", [layer.output_size]):
            yield size, size // tp_size, tp_rank
    else:  # every worker has the whole layer
        for size in getattr(layer, "output_sizes", [layer.output_size]):
            yield size, size, 0
