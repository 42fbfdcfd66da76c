"""Every ranking by the name it has in a profile."""

from dataclasses import dataclass

from act_serve.pipeline.rankings.activation import activation
from act_serve.pipeline.rankings.activation_channel_relative import activation_channel_relative
from act_serve.pipeline.rankings.activation_relative import activation_relative
from act_serve.pipeline.rankings.activation_weight import activation_weight
from act_serve.pipeline.rankings.gradient import gradient
from act_serve.pipeline.rankings.random_rows import random_rows
from act_serve.pipeline.rankings.score import Score
from act_serve.pipeline.rankings.weight import weight
from act_serve.pipeline.rankings.weight_channel_relative import weight_channel_relative
from act_serve.profile.schema import Ranking


@dataclass(frozen=True, slots=True)
class RankingMethod:
    """`score` ranks; with `per_module`, every module gives the same share of its channels, else all compete.

    `reads_text` says whether it runs the models at all, `layerwise` whether one layer at a time is enough for it.
    """

    score: Score
    per_module: bool
    reads_text: bool = True
    layerwise: bool = True


RANKINGS: dict[Ranking, RankingMethod] = {
    "activation_global": RankingMethod(activation, per_module=False),
    "activation_per_module": RankingMethod(activation, per_module=True),
    "activation_relative": RankingMethod(activation_relative, per_module=False),
    "activation_channel_relative": RankingMethod(activation_channel_relative, per_module=False),
    "activation_weight": RankingMethod(activation_weight, per_module=True),
    "gradient": RankingMethod(gradient, per_module=False, layerwise=False),
    "weight_relative": RankingMethod(weight, per_module=False, reads_text=False),
    "weight_per_module": RankingMethod(weight, per_module=True, reads_text=False),
    "weight_channel_relative": RankingMethod(weight_channel_relative, per_module=False, reads_text=False),
    "random": RankingMethod(random_rows, per_module=False, reads_text=False),
}
