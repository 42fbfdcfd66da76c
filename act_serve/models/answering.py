"""Greedy answers and likelihoods of a model, in batches, and in smaller ones where memory is too little for these.

Shapes: B items, T tokens, N answer positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from act_serve.models.examples import Batch, Encoded, Example, collate, encode_prompt, padded_length
from act_serve.models.in_batches import in_batches

# Items that are scored at once; fewer where memory is too little.
NLL_BATCH = 16


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """Logits `[N, V]` at the N positions that predict an answer token."""
    device = next(model.parameters()).device
    hidden = model.get_decoder()(input_ids=batch.ids_BT.to(device), attention_mask=batch.mask_BT.to(device))
    kept_NH = hidden.last_hidden_state[batch.predicts_BT.to(device)]
    return model.get_output_embeddings()(kept_NH).float()


def answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """Greedy answers to the examples' prompts, in their order, without special tokens."""
    prompts = [encode_prompt(tokenizer, example.prompt or "") for example in examples]
    return in_batches(
        lambda part: _generate(model, tokenizer, part, max_new_tokens), prompts, size=batch_size, length=len
    )


def nll_sums(
    model: Any, items: Sequence[Encoded], *, pad_id: int, batch_size: int = NLL_BATCH
) -> list[tuple[float, int]]:
    """Each item's negative log-likelihood, in nats, and its number of answer tokens, in the items' order."""
    return in_batches(
        lambda part: _nll_sums(model, part, pad_id), items, size=batch_size, length=lambda item: len(item.ids)
    )


def _nll_sums(model: Any, items: Sequence[Encoded], pad_id: int) -> list[tuple[float, int]]:
    batch = collate(items, pad_id)
    with torch.inference_mode():
        logits_NV = answer_logits(model, batch)
        targets_N = batch.targets_N.to(logits_NV.device)
        nll_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").cpu()
    counts = batch.predicts_BT.sum(dim=1).tolist()
    return [(float(nll.double().sum()), count) for count, nll in zip(counts, nll_N.split(counts), strict=True)]


def _generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    device = next(model.parameters()).device
    length = padded_length(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids_BT = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    mask_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id
    )
    with torch.inference_mode(), _settings(model, greedy):
        out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=greedy)
    texts = tokenizer.batch_decode(out_BT[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


@contextmanager
def _settings(model: Any, wanted: GenerationConfig) -> Iterator[None]:
    """Takes the model's own settings away: transformers fills in from them whatever `wanted` leaves open."""
    own, model.generation_config = model.generation_config, wanted
    try:
        yield
    finally:
        model.generation_config = own
