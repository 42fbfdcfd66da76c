"""Runs models layer by layer: one layer of each is in memory at a time, and the hidden states wait in a file.

Every layer runs inside a decoder of its own class with one layer, so that attention, masks and rotary embedding are
transformers' own. Shapes: B items of a batch, T tokens, H hidden size, N answer positions, O channels, I inputs.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from act_serve.errors import BuildError, ModelError
from act_serve.models.activations import Seen, recording
from act_serve.models.examples import Batch
from act_serve.models.families import layer_and_projection
from act_serve.models.free_memory import return_freed
from act_serve.models.loading import computing_dtype
from act_serve.models.row_reader import open_rows

_EMBEDDING = "model.embed_tokens.weight"


def watch_layers(
    folders: Sequence[Path], batches: Sequence[Batch], modules: Sequence[str], *, inputs: bool = False
) -> Iterator[Seen]:
    """Yields, for every layer and batch, each model's outputs `[N, O]` (or `inputs`, `[N, I]`) at the answer positions.

    `modules` are in the order of the layers. Held: one layer of each checkpoint, and the hidden states of one batch.
    Those of all batches lie in a temporary file per model. Raises ModelError when a checkpoint can't be run, BuildError
    when the disk has no room for the files.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = [_embedded(folder, batches) for folder in folders]
    for layer, group in groupby(modules, key=lambda name: layer_and_projection(name)[0]):
        names = list(group)
        decoders = [_decoder(folder, layer).to(device) for folder in folders]
        for number, batch in enumerate(batches):
            yield tuple(
                _advance(decoder, hidden, number, batch, names, inputs)
                for decoder, hidden in zip(decoders, states, strict=True)
            )
        del decoders  # before the next ones are read
        return_freed()


def _advance(
    decoder: Any, hidden: list[Tensor], number: int, batch: Batch, names: list[str], inputs: bool
) -> dict[str, Tensor]:
    """Takes the hidden states of one batch through the decoder's layer, and returns what its modules gave."""
    hooked = {name: decoder.layers[0].get_submodule(name.split(".", 3)[3]) for name in names}
    device = next(decoder.parameters()).device
    with torch.no_grad(), recording(hooked, batch.predicts_BT.to(device), inputs=inputs) as seen:
        done = decoder(
            inputs_embeds=hidden[number].to(device), attention_mask=batch.mask_BT.to(device), use_cache=False
        )
    hidden[number].copy_(done.last_hidden_state)
    return seen


def _embedded(folder: Path, batches: Sequence[Batch]) -> list[Tensor]:
    """The token embeddings `[B, T, H]` of every batch, from those rows of the table that occur; in a file."""
    used = torch.cat([batch.ids_BT.flatten() for batch in batches]).unique()
    with open_rows(folder, [_EMBEDDING]) as reader:
        rows_NH = reader.rows(_EMBEDDING, used.tolist()).to(computing_dtype())
    hidden = rows_NH.shape[1]
    memory = _in_a_file(sum(batch.ids_BT.numel() for batch in batches) * hidden, rows_NH.dtype)
    states = memory.split([batch.ids_BT.numel() * hidden for batch in batches])
    found = []
    for batch, flat in zip(batches, states, strict=True):
        found.append(flat.view(*batch.ids_BT.shape, hidden))
        found[-1].copy_(rows_NH[torch.searchsorted(used, batch.ids_BT)])
    return found


def _in_a_file(count: int, dtype: torch.dtype) -> Tensor:
    """So many values in a file that is gone with the last of them; the system keeps as much in memory as is free.

    Its room is taken now: a disk that fills up later would end the process. Raises BuildError when there is none.
    """
    size = count * dtype.itemsize
    try:
        with tempfile.NamedTemporaryFile(prefix="act-serve-hidden-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    except OSError as exc:
        raise BuildError(
            f"the hidden states of the calibration examples need {size / 2**20:.0f} MiB in {tempfile.gettempdir()} "
            f"({exc.strerror or exc}); name a folder with more room in TMPDIR, or lower localize.calibration_items"
        ) from exc


def _decoder(folder: Path, layer: int) -> Any:
    """The model's decoder with this one layer and nothing else, in evaluation mode."""
    config = _one_layer(AutoConfig.from_pretrained(folder, local_files_only=True), layer)
    with torch.device("meta"):
        decoder = AutoModel.from_config(config, dtype=computing_dtype(), attn_implementation="eager")
    # A buffer that is computed, not read: it needs a real device.
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    decoder.embed_tokens, decoder.norm = nn.Identity(), nn.Identity()
    block = decoder.layers[0]
    named = {name: f"model.layers.{layer}.{name}" for name in block.state_dict()}
    with open_rows(folder, list(named.values())) as reader:
        weights = {name: reader.tensor(tensor).to(computing_dtype()) for name, tensor in named.items()}
    try:
        block.load_state_dict(weights, assign=True)
    except RuntimeError as exc:
        raise ModelError(f"layer {layer} of {folder} does not fit its config: {exc}") from exc
    return decoder.eval().requires_grad_(False)


def _one_layer(config: Any, layer: int) -> Any:
    single = deepcopy(config)
    if getattr(config, "layer_types", None):
        single.layer_types = [config.layer_types[layer]]
    single.num_hidden_layers = 1
    return single
