"""A budget in channels or bytes is the same share of parameters for every ranking, and bytes are never exceeded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from act_serve.delta.artifact import ModuleDelta, serialize_modules
from act_serve.delta.channels import OUTSIDE
from act_serve.errors import BuildError, ProfileError
from act_serve.models.families import ChannelModule, channel_modules
from act_serve.pipeline.budget import settle_budget
from act_serve.pipeline.localize import localize
from act_serve.profile.load import load_profile
from act_serve.profile.schema import Profile, Ranking
from tests.pipeline.test_run import profile_file
from tests.tiny_models import make_llama, make_qwen


def settled(folder: Path, base: Path, **changes: Any) -> Profile:
    return settle_budget(load_profile(profile_file(folder, **changes)), base)


def rows_of(modules: list[ChannelModule], profile: Profile, scores: dict[str, torch.Tensor]) -> dict[str, ModuleDelta]:
    widths = {module.name: module.in_features for module in modules}
    chosen = localize(modules, scores, profile.localize, seed=0)
    return {name: ModuleDelta(rows, torch.rand(len(rows), widths[name])) for name, rows in chosen.items()}


def test_channels_are_the_same_share_of_parameters(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    localize = settled(tmp_path, base, localize={"channels": 0.125}).localize
    assert (localize.p, localize.channels, localize.bytes) == (0.125, None, None)


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("ranking", ["weight_relative", "weight_per_module", "activation_global", "random"])
def test_bytes_are_spent_and_not_exceeded(tmp_path: Path, stored: Any, ranking: Ranking) -> None:
    base = make_llama(tmp_path / "base", hidden=256)
    changes: dict[str, Any] = {"localize": {"bytes": "300 kB", "ranking": ranking}, "stored": stored}
    profile = settled(tmp_path, base, **changes)
    modules = channel_modules(base)
    narrow_first = {module.name: torch.full((module.out_features,), 1.0 / module.in_features) for module in modules}
    wide_first = {module.name: torch.full((module.out_features,), 1.0 * module.in_features) for module in modules}
    for scores in (narrow_first, wide_first):
        size = len(serialize_modules(rows_of(modules, profile, scores), stored))
        assert 0.9 * 300_000 <= size <= 300_000
    assert profile == settled(tmp_path, base, **changes)


@pytest.mark.parametrize("ranking", ["weight_relative", "weight_per_module"])
def test_bytes_hold_with_rows_of_all_lengths(tmp_path: Path, ranking: Ranking) -> None:
    base = make_llama(tmp_path / "base", hidden=64)
    profile = settled(tmp_path, base, localize={"bytes": "60 kB", "ranking": ranking, "include": list(OUTSIDE)})
    modules = channel_modules(base, OUTSIDE)
    narrow_first = {module.name: torch.full((module.out_features,), 1.0 / module.in_features) for module in modules}
    wide_first = {module.name: torch.full((module.out_features,), 1.0 * module.in_features) for module in modules}
    for scores in (narrow_first, wide_first):
        assert 0.75 * 60_000 <= len(serialize_modules(rows_of(modules, profile, scores), "bfloat16")) <= 60_000


def test_every_ranking_spends_the_same(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", hidden=256)
    shares = {
        settled(tmp_path, base, localize={"bytes": 200_000, "ranking": ranking}).localize.p
        for ranking in ("weight_relative", "weight_per_module", "random")
    }
    assert len(shares) == 1


def test_biases_count(tmp_path: Path) -> None:
    base = make_qwen(tmp_path / "base")
    profile = settled(tmp_path, base, localize={"bytes": 12_000, "ranking": "weight_per_module"})
    modules = channel_modules(base)
    deltas = {
        name: ModuleDelta(delta.rows, delta.delta, torch.rand(len(delta.rows)))
        for name, delta in rows_of(modules, profile, {m.name: torch.rand(m.out_features) for m in modules}).items()
    }
    assert len(serialize_modules(deltas, "bfloat16")) <= 12_000


def test_budgets_that_cannot_be(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    with pytest.raises(ProfileError, match="give one budget, not p and bytes"):
        settled(tmp_path, base, localize={"p": 0.1, "bytes": "1MB"})
    with pytest.raises(ProfileError, match=r"localize\.channels: Input should be less than or equal to 1"):
        settled(tmp_path, base, localize={"channels": 5})
    with pytest.raises(ProfileError, match="leave the localize budget out"):
        settled(tmp_path, base, localize={"bytes": "1MB"}, search={"keep": 0.9})
    with pytest.raises(BuildError, match="too few for any rows"):
        settled(tmp_path, base, localize={"bytes": 100})


def test_more_bytes_than_the_model_has(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    assert settled(tmp_path, base, localize={"bytes": "1GB"}).localize.p == 1.0
