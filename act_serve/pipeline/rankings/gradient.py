"""First-order gain of moving a row from the base to the source, from one backward pass on the ability's data.

As in the first-order saliency of Molchanov et al., arXiv 1906.10771: |Σ_j g_ij·ΔW_ij|, whose units are those of the
loss, so that rows of all modules can be compared.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from act_serve.errors import BuildError, ModelError
from act_serve.models.loading import load_model, untie
from act_serve.models.row_reader import RowReader, as_rows, open_rows
from act_serve.pipeline.rankings.score import Pair


def gradient(pair: Pair) -> dict[str, Tensor]:
    """|Σ_j g_ij·ΔW_ij| per row, float64 `[O]` per module; g is the gradient of the answers' mean NLL at the base.

    Each weight's gradient is reduced to one number per row as soon as it is there, so that no two are kept. Raises
    DataError with too few answer tokens, ModelError when a gradient is not finite, BuildError layer by layer.
    """
    if pair.layerwise:
        raise BuildError(
            "ranking by gradient runs backwards through the whole base model and can't go layer by layer; choose "
            "another localize.ranking, such as weight_relative or activation_weight, or localize.memory: together"
        )
    batches = pair.batches()
    base = untie(load_model(pair.base)) if pair.include else load_model(pair.base)
    sums: dict[str, Tensor] = {}
    positions = 0
    with open_rows(pair.source) as source:
        handles = [_reduce(base.get_submodule(name), name, source, sums) for name in pair.names]
        for batch in batches:
            positions += int(batch.predicts_BT.sum())
            with torch.enable_grad():
                logits_BTV = base(input_ids=batch.ids_BT.to(base.device), attention_mask=batch.mask_BT.to(base.device))
                logits_NV = logits_BTV.logits[batch.predicts_BT.to(base.device)].float()
                cross_entropy(logits_NV, batch.targets_N.to(base.device), reduction="sum").backward()
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise ModelError(f"{name} has a NaN or infinite gradient; one of the two models is damaged")
    return {name: total.abs() / positions for name, total in sums.items()}


def _reduce(
    module: nn.Module, name: str, source: RowReader, sums: dict[str, Tensor]
) -> torch.utils.hooks.RemovableHandle:
    weight = module.get_parameter("weight").requires_grad_(True)

    def reduce(_weight: Tensor) -> None:
        assert weight.grad is not None  # the hook runs after it was accumulated
        difference_OI = source.matrix(name).to(weight.device).float() - as_rows(name, weight.detach()).float()
        gain_O = (as_rows(name, weight.grad).float() * difference_OI).sum(1).double().cpu()
        sums[name] = gain_O + sums[name] if name in sums else gain_O
        weight.grad = None

    return weight.register_post_accumulate_grad_hook(reduce)
