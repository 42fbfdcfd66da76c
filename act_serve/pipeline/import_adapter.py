"""The change that a PEFT adapter makes to its base: LoRA or SHiRA."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from act_serve.errors import ModelError, PairMismatchError
from act_serve.models.families import channel_modules
from act_serve.models.row_reader import open_rows
from act_serve.pipeline import import_lora, import_shira
from act_serve.pipeline.adapted_module import AdaptedModule
from act_serve.pipeline.import_rows import Given

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_INSTEAD = "merge it with PEFT (merge_and_unload, save_pretrained) and import the merged checkpoint"


def adapter_change(base: Path, folder: Path) -> Given:
    """Gives the change that the adapter in `folder` makes to the model in `base`.

    Raises ModelError when the adapter can't be read or is of a kind that isn't supported, PairMismatchError when it
    was made for another model.
    """
    config = _read_config(folder)
    form = config.get("peft_type")
    if form not in ("LORA", "SHIRA"):
        raise ModelError(f"{folder}: PEFT type {form!r} can't be imported, only LORA and SHIRA; {_INSTEAD}")
    kind = import_lora if form == "LORA" else import_shira
    if odd := kind.oddities(config):
        raise ModelError(f"{folder} is no plain {form} adapter ({'; '.join(odd)}); {_INSTEAD}")
    adapted = _by_module(folder, kind.TENSOR_NAMES)
    modules = {module.name: module for module in channel_modules(base)}
    _check_names(folder, adapted, modules, base)
    with open_rows(base) as reader:
        names = set(reader.names())
    changes = {
        name: partial(kind.change, AdaptedModule(folder, config, modules[name], f"{name}.bias" in names, parts))
        for name, parts in adapted.items()
    }
    return Given("lora" if form == "LORA" else "shira", changes)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as exc:
        raise ModelError(f"{folder}: {CONFIG_FILE} can't be read ({exc})") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{folder}: {CONFIG_FILE} is not a JSON object")
    return config


def _by_module(folder: Path, names: re.Pattern[str]) -> dict[str, dict[str, Tensor]]:
    """The adapter's tensors by module and part; none may be of another kind."""
    path = folder / TENSORS_FILE
    if not path.is_file():
        pickled = "; pickle files are never read, save it again as safetensors" if any(folder.glob("*.bin")) else ""
        raise ModelError(f"{folder} holds no {TENSORS_FILE}{pickled}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as exc:
        raise ModelError(f"{path} can't be read as safetensors: {exc}") from exc
    adapted: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        found = names.fullmatch(name)
        if found is None:
            raise ModelError(f"{path}: {name[:200]} is no change of a linear module's rows; {_INSTEAD}")
        adapted.setdefault(found["module"], {})[found["part"]] = tensor
    if not adapted:
        raise ModelError(f"{path} holds no tensors")
    return adapted


def _check_names(folder: Path, adapted: Mapping[str, Any], modules: Mapping[str, Any], base: Path) -> None:
    unknown = sorted(adapted.keys() - modules.keys())
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise PairMismatchError(
            f"{folder} adapts {unknown[0][:200]}{more}, not a linear module in the layers of {base}; is it an adapter "
            "for another model?"
        )
