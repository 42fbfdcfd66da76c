"""How differently two models activate each channel on the same text (arXiv 2601.09398, section 3.1).

Shapes: N answer positions of a batch, O channels of a module.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from act_serve.errors import DataError, ModelError
from act_serve.models.examples import Batch


def activation_differences(
    base: Any, source: Any, batches: Iterable[Batch], modules: Sequence[str]
) -> dict[str, Tensor]:
    """Mean over the pooled answer positions of |a(source) − a(base)|, per channel: float64 `[O]` per module.

    Only running sums are kept, so memory doesn't grow with the number of batches. Raises DataError without any
    answer token, ModelError when an activation is not finite.
    """
    sums: dict[str, Tensor] = {}
    positions = 0
    for batch in batches:
        positions += int(batch.predicts_BT.sum())
        before, after = _outputs(base, batch, modules), _outputs(source, batch, modules)
        for name in modules:
            difference_O = (after[name].double() - before[name].double()).abs().sum(0)
            sums[name] = difference_O + sums[name] if name in sums else difference_O
    if positions == 0:
        raise DataError("the calibration examples hold no answer token; give longer answers or more examples")
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise ModelError(f"{name} gives NaN or infinite activations; one of the two models is damaged")
    return {name: total / positions for name, total in sums.items()}


def _outputs(model: Any, batch: Batch, modules: Sequence[str]) -> dict[str, Tensor]:
    """Outputs `[N, O]` of each module at the answer positions."""
    device = next(model.parameters()).device
    predicts_BT = batch.predicts_BT.to(device)
    with torch.no_grad(), _recording(model, modules, predicts_BT) as seen:
        model.get_decoder()(input_ids=batch.ids_BT.to(device), attention_mask=batch.mask_BT.to(device))
    return seen


@contextmanager
def _recording(model: Any, modules: Sequence[str], predicts_BT: Tensor) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output[predicts_BT]

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
