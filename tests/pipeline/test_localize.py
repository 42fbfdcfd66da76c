"""Rankings find planted rows, and all of them spend the same budget."""

from pathlib import Path

import pytest
import torch

from act_serve.errors import BuildError
from act_serve.models.examples import Example
from act_serve.models.families import ChannelModule, channel_modules
from act_serve.pipeline.calibrate import score_channels
from act_serve.pipeline.localize import localize
from act_serve.profile.schema import Localize
from tests.tiny_models import make_llama, plant

TEXTS = [Example(f"question {number}", "the answer is " + "abcdefghij"[number] * 9) for number in range(10)]


def recall(planted: dict[str, list[int]], found: dict[str, torch.Tensor]) -> float:
    hits = sum(len(set(rows) & set(found[name].tolist())) for name, rows in planted.items())
    return hits / sum(map(len, planted.values()))


@pytest.mark.parametrize(
    "ranking", ["activation_per_module", "activation_weight", "weight_per_module", "weight_relative"]
)
@pytest.mark.parametrize("p", [0.0625, 0.125])
def test_planted_rows_are_found(tmp_path: Path, ranking: str, p: float) -> None:
    base = make_llama(tmp_path / "base")
    planted = plant(base, tmp_path / "source", p=p, scale=0.3)
    scores = score_channels(ranking, base=base, source=tmp_path / "source", examples=TEXTS)
    found = localize(channel_modules(base), scores, Localize(ranking=ranking, p=p), seed=0)
    assert recall(planted, found) >= 0.95


def test_random_rows_miss_them(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    planted = plant(base, tmp_path / "source", p=0.125, scale=0.3)
    found = localize(channel_modules(base), {}, Localize(ranking="random", p=0.125), seed=0)
    assert recall(planted, {name: found.get(name, torch.empty(0)) for name in planted}) < 0.4


@pytest.mark.parametrize("ranking", ["activation_global", "activation_per_module", "weight_relative", "random"])
def test_equal_budget(ranking: str) -> None:
    modules = [ChannelModule("a", 64, 32), ChannelModule("b", 32, 64)]
    scores = {module.name: torch.rand(module.out_features) for module in modules}
    found = localize(modules, scores, Localize(ranking=ranking, p=0.25), seed=1)
    spent = sum(len(found[module.name]) * module.in_features for module in modules if module.name in found)
    assert 0.25 * 4096 - 64 < spent <= 0.25 * 4096
    for rows in found.values():
        assert rows.dtype == torch.int32
        assert torch.equal(rows, rows.unique())


@pytest.mark.parametrize("ranking", ["activation_per_module", "weight_relative"])
def test_channels_that_do_not_differ_are_not_chosen(ranking: str) -> None:
    modules = [ChannelModule("a", 64, 32), ChannelModule("b", 32, 64)]
    scores = {"a": torch.zeros(64), "b": torch.zeros(32)}
    scores["a"][[3, 5]] = 1.0
    found = localize(modules, scores, Localize(ranking=ranking, p=0.25), seed=1)
    assert {name: rows.tolist() for name, rows in found.items()} == {"a": [3, 5]}


def test_budget_too_small() -> None:
    with pytest.raises(BuildError, match="too small"):
        localize([ChannelModule("a", 64, 32)], {"a": torch.rand(64)}, Localize(p=0.001), seed=0)
