"""Says before a build what it will do, about how long it takes and how much memory it needs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from act_serve.models.answering import answer_logits
from act_serve.models.examples import Example, collate, encode
from act_serve.models.families import channel_modules, is_mixture, layer_and_projection, read_config
from act_serve.models.layerwise import watch_layers
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.pipeline.memory_use import MemoryUse, fits, memory_use, model_bytes
from act_serve.pipeline.plan_memory import evaluating, training_source, tuning_rows
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.pipeline.search_tasks import search_tasks
from act_serve.profile.schema import Localize, Profile, Search

# A training step costs about this many forward passes over the same tokens, measured on one CPU core.
DENSE_STEP, ROWS_STEP, RETENTION_STEP = 3.6, 3.0, 4.0
# Scoring an item, in forward passes: answers are generated for some of the tasks.
SCORED = 3.0


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One line of the plan; an estimate of `seconds`, good to a factor of two."""

    name: str
    what: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build will do, and the most memory that it takes beyond the libraries', an estimate."""

    stages: tuple[PlannedStage, ...]
    peak_bytes: int


def make_plan(profile: Profile, base: Path, sample: list[Example], others: Sequence[str] = ()) -> Plan:
    """Plans a build after timing one forward pass of the base on a few examples.

    `others` are the abilities of the store that it will be measured with.
    """
    included = profile.localize.include
    use = memory_use(profile.localize.ranking, profile.localize.memory, base, included)
    one_layer = use.layerwise or not (fits(base) or is_mixture(read_config(base)))  # mixtures have no way around it
    seconds_per_item, whole = _forward_cost(base, sample, one_layer), model_bytes(base)
    stages = []
    peak = max(
        whole if use.layerwise or not RANKINGS[profile.localize.ranking].reads_text else 2 * whole, evaluating(base)
    )
    train, tune = profile.source.train, profile.finetune
    if train is not None:
        seconds = DENSE_STEP * seconds_per_item * train.steps * train.batch_size
        stages.append(PlannedStage("source", f"train the ability model densely, {train.steps} steps", seconds))
        peak = max(peak, training_source(base, train))
    search = profile.search
    if not profile.source.ability:
        stages.append(_calibration(profile.localize, use, seconds_per_item))
        shares = " or ".join(f"{p:.1%}" for p in (sorted(search.p) if search else (profile.localize.p,)))
        ranked = f"{shares} of the {' + '.join(('linear', *included))} parameters by {profile.localize.ranking}"
        stages.append(PlannedStage("localize", ranked, 1.0))
        strengths = " or ".join(f"{strength:g}" for strength in profile.transfer.strengths)
        stages.append(PlannedStage("transfer", f"copy these rows' differences, λ = {strengths}", 1.0))
    else:
        whose = "the rows" if len(profile.source.ability) == 1 else "the mean of the rows"
        stages.append(PlannedStage("transfer", f"take {whose} of {', '.join(profile.source.ability)}", 1.0))
    if tune.steps:
        kept = RETENTION_STEP * tune.retention.items_per_step if tune.retention else 0.0
        taught = 1.0 if tune.loss == "distill" else 0.0
        peak = max(peak, tuning_rows(base, tune, max(search.p) if search else profile.localize.p))
        batches = tune.steps * tune.gradient_accumulation * (len(search.p) if search else 1)
        seconds = ((ROWS_STEP + taught) * tune.batch_size + kept) * seconds_per_item * batches
        stages.append(PlannedStage("finetune", f"train the rows alone, {tune.steps} steps", seconds))
    if search is not None:
        stages.append(_validation(profile, search, seconds_per_item))
    tasks = (*profile.score, *profile.retain)
    what = ", ".join(f"{task.name} ({task.items})" for task in tasks)
    variants = 2 if profile.source.ability else 4
    once = SCORED * seconds_per_item * sum(task.items for task in tasks)
    stages.append(PlannedStage("evaluate", what, variants * once))
    if others:
        stages.append(PlannedStage("compose", f"the same beside {', '.join(others)}", len(others) * once))
    return Plan(tuple(stages), peak)


def _calibration(settings: Localize, use: MemoryUse, seconds_per_item: float) -> PlannedStage:
    if not RANKINGS[settings.ranking].reads_text:
        return PlannedStage("calibrate", f"compare both models' weights, {use.what}", 1.0)
    items = settings.calibration_items
    return PlannedStage(
        "calibrate", f"compare both models on {items} answers, {use.what}", 2 * items * seconds_per_item
    )


def _validation(profile: Profile, search: Search, seconds_per_item: float) -> PlannedStage:
    """What the search measures: base and source, then at every p the transfer and the delta."""
    tasks, variants = search_tasks(profile), 2 + 2 * len(set(search.p))
    what = ", ".join(f"{task.name} ({search.items})" for task in tasks)
    seconds = variants * SCORED * seconds_per_item * search.items * len(tasks)
    return PlannedStage("validate", f"at every p, {what}", seconds)


def _forward_cost(base: Path, sample: list[Example], one_layer: bool) -> float:
    """Seconds of one forward pass per item; from the first layer alone where the model may not fit."""
    tokenizer = load_tokenizer(base)
    batch = collate([encode(tokenizer, example) for example in sample], tokenizer.pad_token_id or 0)
    if one_layer:
        modules = channel_modules(base)
        first = [module.name for module in modules if layer_and_projection(module.name)[0] == 0]
        start = time.monotonic()
        next(watch_layers([base], [batch], first))
        return (time.monotonic() - start) * len(modules) / len(first) / len(sample)
    model = load_model(base)
    with torch.no_grad():
        answer_logits(model, batch)  # the first pass also warms caches up
        start = time.monotonic()
        answer_logits(model, batch)
    return (time.monotonic() - start) / len(sample)
