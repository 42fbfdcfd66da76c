"""The optimiser loop that dense training and light fine-tuning share.

A small loop rather than transformers' Trainer: logits are made at answer positions only (a third of this model's
arithmetic is its lm_head), float32 masters stand beside bf16 weights, and the retention term needs a second, bare
forward inside the step.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from act_serve.errors import BuildError
from act_serve.models.answering import answer_logits
from act_serve.models.examples import Batch, Encoded, collate

Report = Callable[[int, int, str], None]
WARMUP_STEPS = 8
CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """`steps` optimiser steps; the learning rate warms up, then falls linearly to 5 % of `learning_rate`."""

    steps: int
    learning_rate: float

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        return self.learning_rate * warm * (1.0 - 0.95 * step / self.steps)


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the answer tokens."""
    logits_NV = answer_logits(model, batch)
    return cross_entropy(logits_NV, batch.targets_N.to(logits_NV.device))


def divergence(wanted_NV: Tensor, tuned_NV: Tensor) -> Tensor:
    """KL(wanted ‖ tuned), mean over the N positions: 0 where the tuned model answers exactly as the wanted one."""
    return kl_div(log_softmax(tuned_NV, -1), log_softmax(wanted_NV, -1), log_target=True, reduction="batchmean")


def training_batches(items: Sequence[Encoded], size: int, pad_id: int, seed: int) -> Iterator[Batch]:
    """Yields shuffled batches without end; each holds items of alike length, so that little is padded."""
    draw = random.Random(seed)
    while True:
        order = list(items)
        draw.shuffle(order)
        for start in range(0, len(order), size * 16):
            window = sorted(order[start : start + size * 16], key=lambda item: len(item.ids))
            groups = [window[at : at + size] for at in range(0, len(window), size)]
            draw.shuffle(groups)
            yield from (collate(group, pad_id) for group in groups)


def optimise(parameters: Sequence[Tensor], loss: Callable[[], Tensor], schedule: Schedule, report: Report) -> float:
    """Runs AdamW over float32 `parameters`; `loss` makes one step's loss and must leave gradients on them.

    Returns the mean loss of the last tenth of the steps. Raises BuildError when the loss is not finite.
    """
    optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    for step in range(schedule.steps):
        value = loss()
        losses.append(float(value))
        if not torch.isfinite(value):
            raise BuildError(f"the loss became {losses[-1]} at step {step + 1}; lower the learning rate")
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        report(step + 1, schedule.steps, f"loss {sum(losses[-10:]) / len(losses[-10:]):.3f}")
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
