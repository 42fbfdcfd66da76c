"""How differently two models activate each channel on the same text (arXiv 2601.09398, section 3.1).

Models are watched whole (`watch_models`) or layer by layer (`act_serve.models.layerwise`); what is summed is the same.
Shapes: N answer positions of a batch, O channels of a module, U what its channels read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from act_serve.delta.channels import LM_HEAD
from act_serve.errors import DataError, ModelError
from act_serve.models.channel_products import channel_inputs, products
from act_serve.models.examples import Batch

# What the modules of each model gave on one batch, by module name; all modules at once or those of one layer.
Seen = tuple[dict[str, Tensor], ...]


def watch_models(
    models: Sequence[Any], batches: Iterable[Batch], modules: Sequence[str], *, inputs: bool = False
) -> Iterator[Seen]:
    """Yields, batch by batch, each model's outputs `[N, O]` (or `inputs`, `[N, U]`) at the answer positions."""
    for batch in batches:
        yield tuple(_seen(model, batch, modules, inputs) for model in models)


def activation_differences(
    batches: Sequence[Batch], watched: Iterable[Seen], channels: Mapping[str, int]
) -> dict[str, Tensor]:
    """Mean over the pooled answer positions of |a(source) − a(base)|, per channel: float64 `[O]` per module.

    `watched` shows base and source on `batches`, `channels` gives each module's O. Only running sums are kept, so
    memory doesn't grow with the number of batches. Raises DataError without any answer token, ModelError when an
    activation is not finite.
    """
    values = (
        (name, after[name].double() - found.double()) for before, after in watched for name, found in before.items()
    )
    return _mean_magnitudes(batches, values, channels)


def activation_means(
    batches: Sequence[Batch], watched: Iterable[Seen], channels: Mapping[str, int]
) -> dict[str, Tensor]:
    """Mean over the pooled answer positions of |a|, per channel: float64 `[O]` per module; raises as above.

    `watched` shows one model.
    """
    values = ((name, found.double()) for (seen,) in watched for name, found in seen.items())
    return _mean_magnitudes(batches, values, channels)


def row_effects(
    batches: Sequence[Batch], watched: Iterable[Seen], channels: Mapping[str, int], difference: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Mean over the pooled answer positions of |ΔW·x|, float64 `[O]` per module; raises as above.

    `watched` shows the inputs of one model; `difference` gives a module's ΔW, float32 `[O, I]`, and is asked for
    one at a time.
    """

    def effect(name: str, inputs_NU: Tensor) -> Tensor:
        inputs = inputs_NU.float() if inputs_NU.is_floating_point() else inputs_NU
        return products(name, inputs, difference(name).to(inputs.device), slice(None)).double()

    values = ((name, effect(name, found)) for (seen,) in watched for name, found in seen.items())
    return _mean_magnitudes(batches, values, channels)


@contextmanager
def recording(modules: Mapping[str, nn.Module], predicts_BT: Tensor, *, inputs: bool) -> Iterator[dict[str, Tensor]]:
    """Fills the yielded dict with what each module gives (or takes) at the marked positions of one forward pass."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = channel_inputs(name, module, arguments[0][predicts_BT]) if inputs else output[predicts_BT]

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _mean_magnitudes(
    batches: Sequence[Batch], values: Iterable[tuple[str, Tensor]], channels: Mapping[str, int]
) -> dict[str, Tensor]:
    positions = sum(int(batch.predicts_BT.sum()) for batch in batches)
    if positions == 0:
        raise DataError("the calibration examples hold no answer token; give longer answers or more examples")
    # All made before the first large tensor comes and goes: among those, they would leave gaps that those don't fit in.
    sums = {name: torch.zeros(count, dtype=torch.float64) for name, count in channels.items()}
    for name, values_NO in values:
        sizes = values_NO.abs()
        if sizes.dim() > 2:  # a norm of heads has its channels once per head
            sizes = sizes.flatten(1, -2).mean(1)
        sums[name] += sizes.sum(0).cpu()
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise ModelError(f"{name} gives NaN or infinite activations; one of the two models is damaged")
    return {name: total / positions for name, total in sums.items()}


def _seen(model: Any, batch: Batch, modules: Sequence[str], inputs: bool) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    hooked = {name: model.get_submodule(name) for name in modules if name != LM_HEAD}
    predicts_BT = batch.predicts_BT.to(device)
    with torch.no_grad(), recording(hooked, predicts_BT, inputs=inputs) as seen:
        done = model.get_decoder()(input_ids=batch.ids_BT.to(device), attention_mask=batch.mask_BT.to(device))
        if LM_HEAD in modules:  # of the answer positions alone: logits of all would be the largest tensor by far
            hidden_NH = done.last_hidden_state[predicts_BT]
            seen[LM_HEAD] = hidden_NH if inputs else model.get_output_embeddings()(hidden_NH)
    return seen
