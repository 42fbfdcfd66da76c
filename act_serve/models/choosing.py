"""Likelihoods of the choices of a question, all in one sequence behind their shared prompt.

Shapes: B questions, T tokens of the longest prompt with all its choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from act_serve.models.examples import Example
from act_serve.models.in_batches import in_batches


@dataclass(frozen=True, slots=True)
class _Packed:
    """A prompt and its choices in one sequence: the tokens, each one's position, and its owner (-1: the prompt)."""

    ids: list[int]
    positions: list[int]
    owners: list[int]
    prompt: int


def choice_likelihoods(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, batch_size: int = 8
) -> list[list[float]]:
    """Log-likelihood in nats of each example's choices, as continuations of its prompt after a space.

    Prompts are read as plain text without a chat template, once for all choices: a choice sees the prompt and itself.
    """
    packed = [_pack(tokenizer, example) for example in examples]
    with torch.inference_mode():
        return in_batches(
            lambda part: _likelihoods(model, part), packed, size=batch_size, length=lambda item: len(item.ids)
        )


def _pack(tokenizer: Any, example: Example) -> _Packed:
    prompt = list(tokenizer(example.prompt or "", add_special_tokens=False)["input_ids"])
    ids, positions, owners = list(prompt), list(range(len(prompt))), [-1] * len(prompt)
    for owner, choice in enumerate(example.choices):
        tokens = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        ids += tokens
        positions += range(len(prompt), len(prompt) + len(tokens))
        owners += [owner] * len(tokens)
    return _Packed(ids, positions, owners, len(prompt))


def _likelihoods(model: Any, packed: Sequence[_Packed]) -> list[list[float]]:
    device = next(model.parameters()).device
    longest = max(len(item.ids) for item in packed)
    ids_BT, positions_BT = (torch.zeros(len(packed), longest, dtype=torch.int64) for _ in range(2))
    seen_BTT = torch.eye(longest, dtype=torch.bool).repeat(len(packed), 1, 1)
    for row, item in enumerate(packed):
        length = len(item.ids)
        ids_BT[row, :length] = torch.tensor(item.ids)
        positions_BT[row, :length] = torch.tensor(item.positions)
        seen_BTT[row, :length, :length] = _visible(torch.tensor(item.owners))
    hidden_BTH = model.get_decoder()(
        input_ids=ids_BT.to(device),
        position_ids=positions_BT.to(device),
        attention_mask=_additive(seen_BTT, model.dtype).to(device),
        use_cache=False,
    ).last_hidden_state
    return [_choice_sums(model, hidden_BTH[row], item) for row, item in enumerate(packed)]


def _visible(owners_T: Tensor) -> Tensor:
    """`[T, T]`: a token sees the prompt and its own choice, up to itself."""
    same = (owners_T[:, None] == owners_T) | (owners_T == -1)
    return same.tril()


def _additive(seen_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(seen_BTT.shape, dtype=dtype).masked_fill(~seen_BTT, torch.finfo(dtype).min)
    return mask[:, None]


def _choice_sums(model: Any, hidden_TH: Tensor, item: _Packed) -> list[float]:
    start, owners = item.prompt, item.owners[item.prompt :]
    # A choice's first token is predicted at the prompt's end, every other one at the token before it.
    before = [
        start + index - 1 if index and owners[index] == owners[index - 1] else start - 1 for index in range(len(owners))
    ]
    logits_NV = model.get_output_embeddings()(hidden_TH[before]).float()
    targets_N = torch.tensor(item.ids[start:], device=logits_NV.device)
    nll_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").tolist()
    sums = [0.0] * (max(owners) + 1)
    for owner, nll in zip(owners, nll_N, strict=True):
        sums[owner] -= nll
    return sums
