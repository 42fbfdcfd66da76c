"""What rows add to the output of their module, for each kind of module (`act_serve.delta.channels`).

Shapes: K rows, I inputs, U what the module's channels read; dimensions before these are those of the tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, pad

from act_serve.delta.channels import kind_of

# Rows are multiplied in groups of so many, the last one filled up with zeros, for the reason that
# `models.examples.LENGTH_MULTIPLE` has: every module has another number of rows.
ROWS_MULTIPLE = 16


def channel_inputs(name: str, module: Any, inputs: Tensor) -> Tensor:
    """What the channels of the module `name` read of its `inputs`, `[..., U]`.

    That is the inputs themselves, hidden states or token ids; for an RMSNorm they are normalised, in float32 and then
    rounded to their dtype, as the norms of transformers do it before they multiply by γ.
    """
    if kind_of(name) != "norms":
        return inputs
    wide = inputs.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.variance_epsilon)).to(inputs.dtype)


def products(name: str, inputs: Tensor, delta_KI: Tensor, rows: Tensor | slice, bias_K: Tensor | None = None) -> Tensor:
    """`[..., K]`: what the rows `delta_KI` of the channels `rows` give for `inputs` of `channel_inputs`."""
    kind = kind_of(name)
    if kind == "norms":
        return inputs[..., rows] * delta_KI[:, 0]
    if kind == "embedding":
        return embedding(inputs, delta_KI.t())
    count = len(delta_KI)
    missing = -count % ROWS_MULTIPLE
    if not missing:  # padding would copy them
        return linear(inputs, delta_KI, bias_K)
    bias = None if bias_K is None else pad(bias_K, (0, missing))
    return linear(inputs, pad(delta_KI, (0, 0, 0, missing)), bias)[..., :count]
