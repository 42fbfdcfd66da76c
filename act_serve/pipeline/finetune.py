"""Light fine-tuning: trains only the transferred rows, so that what comes out is still a sparse delta."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import BuildError
from act_serve.models.answering import answer_logits
from act_serve.models.examples import Example, encode
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.models.row_delta import RowDeltas
from act_serve.pipeline.training import (
    Report,
    Schedule,
    divergence,
    optimise,
    training_batches,
)
from act_serve.profile.schema import FineTune


@dataclass(frozen=True, slots=True)
class Lessons:
    """What is learnt (`ability`) and on what the model must go on answering as the base does (`retained`)."""

    ability: list[Example]
    retained: list[Example]


def finetune(
    *,
    base: Path,
    deltas: Mapping[str, ModuleDelta],
    lessons: Lessons,
    settings: FineTune,
    seed: int,
    report: Report,
    source: Path | None = None,
) -> dict[str, ModuleDelta]:
    """Returns the deltas after `settings.steps` steps on the rows alone; biases stay as transferred.

    The loss is the answer's NLL plus `retention.weight` times KL(base ‖ tuned) on the retained text.
    Raises BuildError when training diverges.
    """
    torch.manual_seed(seed)
    model, tokenizer = load_model(base), load_tokenizer(base)
    teacher = load_model(_needed(source)) if settings.loss == "distill" else None
    tuned = RowDeltas(deltas)
    pad = tokenizer.pad_token_id or 0
    ability = training_batches(
        [encode(tokenizer, example) for example in lessons.ability], settings.batch_size, pad, seed
    )
    retention = settings.retention if lessons.retained else None
    kept = training_batches(
        [encode(tokenizer, example) for example in lessons.retained],
        retention.items_per_step if retention else 1,
        pad,
        seed,
    )

    def loss() -> Tensor:
        batch = next(ability)
        logits_NV = answer_logits(model, batch)
        value = cross_entropy(logits_NV, batch.targets_N.to(logits_NV.device))
        if teacher is not None:
            with torch.no_grad():
                taught_NV = answer_logits(teacher, batch)
            share = settings.distill_weight
            value = (1 - share) * value + share * divergence(taught_NV, logits_NV)
        value.backward()
        if retention is not None:
            batch = next(kept)
            with torch.no_grad(), tuned.bare():
                base_NV = answer_logits(model, batch)
            (retention.weight * divergence(base_NV, answer_logits(model, batch))).backward()
        return value.detach()

    with tuned.attached(model):
        optimise(tuned.parameters(), loss, Schedule(settings.steps, settings.learning_rate), report)
    return tuned.export()


def _needed(source: Path | None) -> Path:
    if source is None:
        raise BuildError("finetune.loss is `distill`, which needs the source model")
    return source
