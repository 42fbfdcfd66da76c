"""How differently two models activate each channel on the same text (arXiv 2601.09398, section 3.1).

Shapes: N answer positions of a batch, O channels of a module, I its inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def difference(batch: Batch) -> Iterator[tuple[str, Tensor]]:
        before, after = _seen(base, batch, modules), _seen(source, batch, modules)
        return ((name, after[name].double() - before[name].double()) for name in modules)

    return _mean_magnitudes(batches, difference)


def activation_means(model: Any, batches: Iterable[Batch], modules: Sequence[str]) -> dict[str, Tensor]:
    """Mean over the pooled answer positions of |a|, per channel: float64 `[O]` per module; raises as above."""

    def outputs(batch: Batch) -> Iterator[tuple[str, Tensor]]:
        return ((name, found.double()) for name, found in _seen(model, batch, modules).items())

    return _mean_magnitudes(batches, outputs)


def row_effects(
    model: Any, batches: Iterable[Batch], modules: Sequence[str], difference: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Mean over the pooled answer positions of |ΔW·x|, float64 `[O]` per module; x is the module's input in `model`.

    `difference` gives a module's ΔW, float32 `[O, I]`, and is asked for one at a time. Raises as above.
    """

    def effects(batch: Batch) -> Iterator[tuple[str, Tensor]]:
        seen = _seen(model, batch, modules, inputs=True)
        return ((name, (found.float() @ difference(name).T).double()) for name, found in seen.items())

    return _mean_magnitudes(batches, effects)


def _mean_magnitudes(
    batches: Iterable[Batch], values: Callable[[Batch], Iterable[tuple[str, Tensor]]]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    positions = 0
    for batch in batches:
        positions += int(batch.predicts_BT.sum())
        for name, values_NO in values(batch):
            total_O = values_NO.abs().sum(0)
            sums[name] = total_O + sums[name] if name in sums else total_O
    if positions == 0:
        raise DataError("the calibration examples hold no answer token; give longer answers or more examples")
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise ModelError(f"{name} gives NaN or infinite activations; one of the two models is damaged")
    return {name: total / positions for name, total in sums.items()}


def _seen(model: Any, batch: Batch, modules: Sequence[str], *, inputs: bool = False) -> dict[str, Tensor]:
    """Outputs `[N, O]` (or `inputs`, `[N, I]`) of each module at the answer positions."""
    device = next(model.parameters()).device
    predicts_BT = batch.predicts_BT.to(device)
    with torch.no_grad(), _recording(model, modules, predicts_BT, inputs) as seen:
        model.get_decoder()(input_ids=batch.ids_BT.to(device), attention_mask=batch.mask_BT.to(device))
    return seen


@contextmanager
def _recording(model: Any, modules: Sequence[str], predicts_BT: Tensor, inputs: bool) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (arguments[0] if inputs else output)[predicts_BT]

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
