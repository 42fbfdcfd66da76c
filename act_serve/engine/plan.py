"""Where a checkpoint module's rows lie in vLLM's layers: fused, and sharded by tensor parallelism."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CompilationMode
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from act_serve.delta.artifact import ModuleDelta
from act_serve.delta.channels import Kind, kind_of
from act_serve.delta.fit import ModuleShape
from act_serve.engine.row_memory import RowMemory
from act_serve.errors import EngineError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Layers whose weights other code reads without a call of ``apply``: DeepSeek's latent attention, and Mamba.
_READ_DIRECTLY = frozenset({"kv_b_proj", "conv1d"})


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

    def of(self, rows: torch.Tensor) -> slice:
        """Which of an ability's rows of the module, ascending, this worker computes."""
        if len(self.rows) == self.shape.out_features and len(rows) and rows[-1].item() in self.rows:
            return slice(0, len(rows))
        bounds = torch.tensor([self.rows.start, self.rows.stop], dtype=rows.dtype)
        return slice(*torch.searchsorted(rows, bounds).tolist())


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """A vLLM layer on this worker.

    Attributes:
        name: in vLLM's model; ``layer``: the module itself.
        parts: the checkpoint modules fused in it, in order.
        columns: the slice of the input features that this worker multiplies.
        adds_bias: whether this worker is the one that adds the bias.
        kind: of the layer's channels.
    """

    name: str
    layer: Any
    parts: tuple[Part, ...]
    columns: slice
    adds_bias: bool
    kind: Kind = "linear"

    @property
    def width(self) -> int:
        """Number of input features that this worker multiplies, I."""
        return len(range(*self.columns.indices(self.parts[0].shape.in_features)))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the layer's weights."""
        return self.layer.weight.dtype if self.kind == "norms" else self.layer.params_dtype

    @property
    def out_features(self) -> int:
        """Number of outputs that this worker computes, O."""
        return sum(len(part.rows) for part in self.parts)

    def segment(self, modules: Mapping[str, ModuleDelta], memory: RowMemory) -> ModuleDelta:
        """A copy of an ability's rows in the layer's local output, in the layer's dtype; possibly none.

        Every value is moved and converted once.

        Args:
            modules: the ability's delta by checkpoint module, rows ascending.
            memory: where the copy lies.

        Returns:
            rows ``[k]`` int32, ascending; delta ``[k, I]`` and bias ``[k]`` for the columns and rows of this worker.
        """
        found = [(p, modules[p.module], p.of(modules[p.module].rows)) for p in self.parts if p.module in modules]
        count = sum(mine.stop - mine.start for _, _, mine in found)
        rows = memory.empty([count], torch.int32)
        if self.kind == "embedding":  # looked up by token, so that a token's values lie side by side
            delta = memory.empty([self.width, count], self.dtype).t()
        else:
            delta = memory.empty([count, self.width], self.dtype)
        biased = self.adds_bias and any(
            module.bias_delta is not None and bool(module.bias_delta[mine].any()) for _, module, mine in found
        )
        bias = memory.empty([count], self.dtype).zero_() if biased else None
        end = 0
        for part, module, mine in found:
            here = slice(end, end := end + mine.stop - mine.start)
            # The parts lie one after the other, each with ascending rows, so all are ascending.
            np.add(module.rows[mine].numpy(), part.start - part.rows.start, out=rows[here].numpy())
            delta[here].copy_(module.delta[mine, self.columns])
            if bias is not None and module.bias_delta is not None:
                bias[here] = module.bias_delta[mine]
        return ModuleDelta(rows, delta, bias)


def kinds_left_out(config: VllmConfig) -> frozenset[Kind]:
    """The kinds of channels that no ability can change under vLLM's settings."""
    kinds = set[Kind]()
    if config.speculative_config is not None:
        # A drafting model may share lm_head and embedding, and calls them with tokens that are not the step's.
        kinds |= {"lm_head", "embedding"}
    if config.model_config is not None and config.model_config.enable_prompt_embeds:
        kinds.add("embedding")  # looked up for those of the step's tokens that came without
    if config.parallel_config.enable_batch_sharded_sampling:
        kinds.add("lm_head")  # each worker computes logits of other requests
    if config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        kinds.add("norms")  # compiled from outside, and nothing there lets a step go uncompiled
    return frozenset(kinds)


def plan_layers(model: torch.nn.Module, without: Collection[Kind] = ()) -> list[LayerPlan]:
    """Every layer of a vLLM model that delta rows can be added to, of the pipeline stage that the model is.

    Others are left out, so that an ability with rows there is refused: experts of a mixture, which are no linear
    layers in vLLM; a layer that multiplies without its ``quant_method``, such as an expert router with kernels of its
    own; a layer that the checkpoint stores in other parts than vLLM's; a norm that is more than vLLM's RMSNorm; an
    lm_head whose logits have a dtype of their own, which vLLM multiplies by itself.

    Args:
        without: kinds of channels to leave out, from :func:`kinds_left_out`.
    """
    own_dtype = any(
        processor.head_dtype not in (None, head.params_dtype)
        for processor in model.modules()
        if isinstance(processor, LogitsProcessor)
        for head in model.modules()
        if isinstance(head, ParallelLMHead)
    )
    fused: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    plans = []
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase) and _calls_apply(name, layer):
            modules, shards = _modules(name, fused), list(_shards(layer))
            if len(modules) == len(shards):
                plans.append(_plan(name, layer, modules, shards))
        elif type(layer) is RMSNorm and kind_of(name) == "norms":
            # One whose weights are loaded in a way of its own is called in one, too (plamo3).
            if layer.has_weight and layer.variance_size_override is None and not hasattr(layer.weight, "weight_loader"):
                plans.append(_norm_plan(name, layer))
        elif isinstance(layer, VocabParallelEmbedding) and not layer.num_added_embeddings:
            kind = kind_of(name)
            if kind == "embedding" or (kind == "lm_head" and isinstance(layer, ParallelLMHead) and not own_dtype):
                plans.append(_vocabulary_plan(name, layer, kind))
    return [plan for plan in plans if plan.kind not in without]


def _norm_plan(name: str, norm: RMSNorm) -> LayerPlan:
    """Every worker normalises whole tokens, or whole heads."""
    size = norm.weight.numel()
    part = Part(name, ModuleShape(size, 1), range(size), 0)
    return LayerPlan(name, norm, (part,), slice(None), adds_bias=True, kind="norms")


def _vocabulary_plan(name: str, layer: VocabParallelEmbedding, kind: Kind) -> LayerPlan:
    """Of lm_head a worker has the rows of its tokens; of the embedding's columns what they say of its tokens."""
    tokens, hidden, shard = layer.org_vocab_size, layer.embedding_dim, layer.shard_indices
    mine = range(shard.org_vocab_start_index, shard.org_vocab_end_index)
    if kind == "lm_head":
        part = Part(name, ModuleShape(tokens, hidden, getattr(layer, "bias", None) is not None), mine, 0)
        return LayerPlan(name, layer, (part,), slice(None), adds_bias=True, kind=kind)
    part = Part(name, ModuleShape(hidden, tokens), range(hidden), 0)
    return LayerPlan(name, layer, (part,), slice(mine.start, mine.stop), adds_bias=True, kind=kind)


def _calls_apply(name: str, layer: LinearBase) -> bool:
    return type(layer).forward.__module__ == linear.__name__ and name.rpartition(".")[2] not in _READ_DIRECTLY


def _modules(name: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    prefix, _, leaf = name.rpartition(".")
    return [f"{prefix}.{part}" if prefix else part for part in fused.get(leaf, (leaf,))]


def _plan(name: str, layer: LinearBase, modules: Sequence[str], shards: Sequence[tuple[int, int, int]]) -> LayerPlan:
    row_parallel = isinstance(layer, RowParallelLinear)
    tp_rank = getattr(layer, "tp_rank", 0)
    columns = slice(None)
    if row_parallel:
        width = layer.input_size_per_partition
        columns = slice(tp_rank * width, (tp_rank + 1) * width)
    parts, start = [], 0
    for module, (size, local, shard) in zip(modules, shards, strict=True):
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


def whole_modules(per_worker: Iterable[Sequence[Part]]) -> dict[str, ModuleShape]:
    """The modules of all workers together, of which every row is on some worker.

    Args:
        per_worker: the parts that each tensor-parallel worker of each pipeline stage has.

    Raises:
        EngineError: rows of a module are on no worker, so that a delta could not be applied wholly.
    """
    shapes, rows = {}, defaultdict[str, set[int]](set)
    for parts in per_worker:
        for part in parts:
            shapes[part.module] = part.shape
            rows[part.module].update(part.rows)
    for name, shape in shapes.items():
        if len(rows[name]) != shape.out_features:
            raise EngineError(f"{name} has {shape.out_features} rows, and the workers have {len(rows[name])} of them")
    return shapes
