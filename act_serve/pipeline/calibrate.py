"""Scores the channels of a pair by one ranking."""

from pathlib import Path

from torch import Tensor

from act_serve.models.examples import Example
from act_serve.pipeline.rankings.activation import activation
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.pipeline.rankings.score import Pair
from act_serve.pipeline.rankings.weight import weight
from act_serve.profile.schema import Ranking


def score_channels(
    ranking: Ranking, *, base: Path, source: Path, examples: list[Example], seed: int = 0
) -> dict[str, Tensor]:
    """Returns what `ranking` ranks by, `[O]` per module name; `localize` chooses from it.

    Raises DataError without any answer token, ModelError for activations or gradients that are not finite.
    """
    return RANKINGS[ranking].score(Pair(base, source, tuple(examples), seed))


def calibrate(*, base: Path, source: Path, examples: list[Example]) -> dict[str, Tensor]:
    """Returns Δa, float64 `[O]` per module name, over the answer tokens of `examples` (paper, equation 1)."""
    return activation(Pair(base, source, tuple(examples)))


def weight_differences(*, base: Path, source: Path) -> dict[str, Tensor]:
    """Returns the root mean square of each row's difference, float64 `[O]` per module name."""
    return weight(Pair(base, source))
