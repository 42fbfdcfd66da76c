"""What a PEFT SHiRA adapter adds to a weight: single values at their places (peft/tuners/shira/layer.py)."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from act_serve.errors import ModelError, PairMismatchError
from act_serve.pipeline.adapted_module import AdaptedModule
from act_serve.pipeline.import_rows import Change

TENSOR_NAMES = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>shira_weight|shira_indices)")


def oddities(_config: Mapping[str, Any]) -> list[str]:
    """No option of SHiRA changes what the saved values and places mean."""
    return []


def change(adapted: AdaptedModule) -> Change:
    """The weight's change `[out, in]` and no bias; raises ModelError or PairMismatchError when that can't be."""
    rows, columns = adapted.module.out_features, adapted.module.in_features
    values = adapted.parts.get("shira_weight")
    if values is None:
        raise ModelError(f"{adapted.folder} is damaged: {adapted.module.name} has no shira_weight")
    # PEFT writes places as integers, on Windows as floats.
    row, column = adapted.tensor("shira_indices", 2, values.numel()).long()
    weight = torch.zeros(rows, columns)
    if len(row) and (min(row.min(), column.min()) < 0 or row.max() >= rows or column.max() >= columns):
        raise PairMismatchError(
            f"{adapted.folder}: the places of {adapted.module.name} are not all within its {rows} x {columns} weights "
            "in the base; is it an adapter for another model?"
        )
    return weight.index_put_((row, column), values.float(), accumulate=True), None
