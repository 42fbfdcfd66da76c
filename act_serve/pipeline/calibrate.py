"""Scores the channels of a pair by one ranking."""

from pathlib import Path

import torch
from torch import Tensor

from act_serve.errors import BuildError
from act_serve.models.examples import Example
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.pipeline.rankings.score import Pair
from act_serve.profile.schema import Ranking


def score_channels(
    ranking: Ranking, *, base: Path, source: Path, examples: list[Example], seed: int = 0
) -> dict[str, Tensor]:
    """Returns what `ranking` ranks by, `[O]` per module name; `localize` chooses from it.

    Raises DataError without any answer token, ModelError for activations or gradients that are not finite, BuildError
    when memory runs out.
    """
    try:
        return RANKINGS[ranking].score(Pair(base, source, tuple(examples), seed))
    except (MemoryError, torch.OutOfMemoryError) as exc:
        raise BuildError(
            f"out of memory while ranking by {ranking}: it holds the models whole; set localize.ranking to "
            "weight_relative, which reads one tensor at a time, or build on a larger machine (finished stages are kept)"
        ) from exc


def score_name(ranking: Ranking) -> str:
    """What `ranking` ranks by; rankings with the same score differ in the selection alone and share a stage."""
    return RANKINGS[ranking].score.__name__
