"""Greedy answers and likelihoods of a model, in batches.

Shapes: B items, T tokens, N answer positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from act_serve.models.examples import Batch, Encoded, Example, batches, encode_prompt


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
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = _generate(model, tokenizer, [prompts[index] for index in chosen], max_new_tokens)
        for index, text in zip(chosen, texts, strict=True):
            found[index] = text
    return found


def mean_nll(model: Any, items: Sequence[Encoded], *, pad_id: int, batch_size: int = 16) -> float:
    """Mean negative log-likelihood per answer token, in nats, pooled over all items."""
    total, count = 0.0, 0
    for batch in batches(items, batch_size, pad_id):
        with torch.inference_mode():
            logits_NV = answer_logits(model, batch)
        targets_N = batch.targets_N.to(logits_NV.device)
        total += float(torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum"))
        count += len(targets_N)
    return total / max(1, count)


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids_BT = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with torch.inference_mode():
        out_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    texts = tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]
