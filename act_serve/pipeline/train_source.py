"""Trains an ability model from the base, densely, for when no ready-made one exists.

A small loop rather than transformers' Trainer: float32 masters stand beside bf16 weights, so that the gradients and
the model take two bytes a parameter each. Where the model computes in float32, the masters are its weights. Masters
begin with the checkpoint's own values and end in its dtype, so that what was not trained does not differ from the base.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act_serve.errors import BuildError
from act_serve.models.examples import Example, encode_answered
from act_serve.models.families import channel_modules
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.models.row_reader import open_rows
from act_serve.pipeline.training import BETAS, CLIP_NORM, Report, Schedule, answer_loss, training_batches
from act_serve.profile.schema import TrainSource


def train_source(
    *, base: Path, examples: list[Example], settings: TrainSource, seed: int, folder: Path, report: Report
) -> Path:
    """Trains every linear channel of `base` on `examples` and saves the model in `folder`, atomically.

    Embedding, norms and lm_head stay as they are: only then does the whole difference to the base lie in channels
    that are ranked where a profile includes no others. Raises DataError for an example without an answer token, and
    BuildError when training diverges.
    """
    torch.manual_seed(seed)
    model, tokenizer = load_model(base), load_tokenizer(base)
    weights, dtype = _linear_weights(model, base), _dtype(base)
    masters = [master.requires_grad_(True) for master in _masters(weights, base)]
    items = encode_answered(tokenizer, examples, "the training data")
    stream = training_batches(items, settings.batch_size, tokenizer.pad_token_id or 0, seed)

    def loss() -> Tensor:
        _copy(masters, weights)
        value = answer_loss(model, next(stream))
        gradients = torch.autograd.grad(value, weights)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
        return value.detach()

    for weight in weights:
        weight.requires_grad_(True)
    optimise(masters, loss, Schedule(settings.steps, settings.learning_rate), report)
    if model.dtype != dtype:
        del model, weights, stream
        model = load_model(base, dtype=str(dtype).removeprefix("torch."))
        weights = _linear_weights(model, base)
    _copy(masters, weights)
    _save(model, tokenizer, folder)
    return folder


def _linear_weights(model: Any, base: Path) -> list[Tensor]:
    return [model.get_submodule(module.name).weight for module in channel_modules(base)]


def _masters(weights: list[Tensor], base: Path) -> list[Tensor]:
    """The checkpoint's linear weights in float32; those of the model itself where it has them so."""
    if all(weight.dtype == torch.float32 for weight in weights):
        return [weight.detach() for weight in weights]
    with open_rows(base) as reader:
        matrices = (reader.matrix(module.name).float() for module in channel_modules(base))
        return [matrix.to(weight.device) for matrix, weight in zip(matrices, weights, strict=True)]


def _dtype(base: Path) -> torch.dtype:
    """In which the checkpoint has its linear weights."""
    with open_rows(base) as reader:
        return reader.matrix(channel_modules(base)[0].name).dtype


def optimise(parameters: Sequence[Tensor], loss: Callable[[], Tensor], schedule: Schedule, report: Report) -> None:
    """Runs AdamW over float32 `parameters`; `loss` makes one step's loss and must leave gradients on them.

    Raises BuildError when the loss is not finite.
    """
    optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, weight_decay=0.0)
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


def _copy(masters: list[Tensor], weights: list[Tensor]) -> None:
    with torch.no_grad():
        for master, weight in zip(masters, weights, strict=True):
            weight.copy_(master)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
