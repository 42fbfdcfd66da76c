"""Scores the channels of a pair by one ranking."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from act_serve.errors import BuildError, ModelError, PairMismatchError
from act_serve.models.examples import Example
from act_serve.models.free_memory import out_of_memory
from act_serve.pipeline.memory_use import can_go_layerwise, memory_use
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.pipeline.rankings.score import Pair
from act_serve.profile.schema import Memory, Ranking


def score_channels(
    ranking: Ranking,
    *,
    base: Path,
    source: Path,
    examples: list[Example],
    seed: int = 0,
    memory: Memory = "auto",
    include: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Returns what `ranking` ranks by, `[O]` per module name; `localize` chooses from it.

    `include` names kinds of channels beside those of the linear modules. Raises DataError with too few answer tokens,
    ModelError for weights, activations or gradients that are not finite, PairMismatchError when the models don't differ
    at all, BuildError when memory runs out or the ranking can't go layer by layer and is asked to.
    """
    layerwise = memory_use(ranking, memory, base, include).layerwise
    try:
        scores = RANKINGS[ranking].score(Pair(base, source, tuple(examples), seed, layerwise, tuple(include)))
    except (MemoryError, RuntimeError, ModelError) as exc:  # ModelError: a model that does not fit
        if not out_of_memory(exc):
            raise
        possible = can_go_layerwise(ranking, base, include)
        raise BuildError(f"out of memory while ranking by {ranking}: {_advice(layerwise, possible)}") from exc
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ModelError(f"{name} has NaN or infinite scores by {ranking}; {base} or {source} is damaged")
    if not any(score.any() for score in scores.values()):
        raise PairMismatchError(
            f"{source} does not differ from {base} in any channel by {ranking}; name a model that was trained further"
        )
    return scores


def score_name(ranking: Ranking, include: Sequence[str] = ()) -> str:
    """What `ranking` ranks by; rankings with the same score differ in the selection alone and share a stage."""
    return "-".join((RANKINGS[ranking].score.__name__, *include))


def _advice(layerwise: bool, possible: bool) -> str:
    smaller = "set localize.ranking to weight_relative, which reads one tensor at a time, or build on a larger machine"
    if layerwise:
        way = ""
    elif possible:
        way = "set localize.memory to layerwise, which holds one layer of each model at a time, or "
    else:
        way = "it holds models whole; "
    return f"{way}{smaller} (finished stages are kept)"
