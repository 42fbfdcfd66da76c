"""What dense training and light fine-tuning share: the schedule, the order of the data, the loss on answers."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from act_serve.models.answering import answer_logits
from act_serve.models.examples import Batch, Encoded, collate

Report = Callable[[int, int, str], None]
WARMUP_STEPS = 8
CLIP_NORM = 1.0
BETAS = (0.9, 0.95)


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


def training_groups(items: Sequence[Encoded], size: int, seed: int) -> Iterator[list[Encoded]]:
    """Yields shuffled groups without end; each holds items of alike length, so that little is padded."""
    draw = random.Random(seed)
    while True:
        order = list(items)
        draw.shuffle(order)
        for start in range(0, len(order), size * 16):
            window = sorted(order[start : start + size * 16], key=lambda item: len(item.ids))
            groups = [window[at : at + size] for at in range(0, len(window), size)]
            draw.shuffle(groups)
            yield from groups


def training_batches(items: Sequence[Encoded], size: int, pad_id: int, seed: int) -> Iterator[Batch]:
    """Yields the groups of `training_groups` as padded batches."""
    return (collate(group, pad_id) for group in training_groups(items, size, seed))
