"""Each finding's measurement on numbers whose result is known."""

import pytest
import torch

from act_serve.models.examples import Example
from act_serve.pipeline.analyze.concentration import concentration
from act_serve.pipeline.analyze.disentanglement import disentanglement
from act_serve.pipeline.analyze.overlap import overlap
from act_serve.pipeline.analyze.stability import halves, rewordings, samples, stability
from act_serve.pipeline.analyze.sufficiency import CHOSEN, CHOSEN_TUNED, Sufficiency, smallest_sufficient

CHANNELS = {"a": 400, "b": 600}


def random_mask(p: float, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(count, generator=draw)[: round(p * count)].sort().values
        for name, count in CHANNELS.items()
    }


def test_even_differences_are_not_concentrated() -> None:
    found = concentration("x", {"a": torch.ones(400), "b": torch.ones(600)}, [0.05, 0.5])
    assert found.top_shares == pytest.approx({0.05: 0.05, 0.5: 0.5})
    assert found.curve[-1] == pytest.approx((1.0, 1.0))


def test_few_large_differences_are_concentrated() -> None:
    values = torch.ones(1000)
    values[:50] = 100.0
    found = concentration("x", {"a": values}, [0.05])
    assert found.top_shares[0.05] == pytest.approx(5000 / 5950)
    assert found.largest == 100.0
    assert found.median == 1.0
    share_above = dict(found.ccdf)
    assert share_above[100.0] < 0.05  # of channels with more than 100 there are none


def test_modules_of_other_scale_are_told_from_concentration() -> None:
    found = concentration("x", {"a": 100 * torch.ones(50), "b": torch.ones(950)}, [0.05])
    assert found.top_shares[0.05] > 0.8
    assert found.top_shares_in_modules[0.05] == pytest.approx(0.05)


def test_overlap_of_equal_disjoint_and_random_masks() -> None:
    mask = random_mask(0.2, seed=1)
    same = overlap(mask, mask, CHANNELS)
    assert (same.share, same.rows) == (1.0, 200)
    apart = overlap({"a": torch.arange(0, 10)}, {"a": torch.arange(10, 30)}, CHANNELS)
    assert (apart.share, apart.rows) == (0.0, 0)
    drawn = [overlap(mask, random_mask(0.2, seed), CHANNELS) for seed in range(2, 22)]
    assert sum(each.share for each in drawn) / len(drawn) == pytest.approx(0.2, abs=0.03)
    assert all(each.chance == each.chance_in_modules == pytest.approx(0.2) for each in drawn)


def test_chance_within_modules_knows_that_both_prefer_one() -> None:
    left, right = {"a": torch.arange(100)}, {"a": torch.arange(300, 400)}
    found = overlap(left, right, CHANNELS)
    assert found.chance == pytest.approx(0.1)
    assert found.chance_in_modules == pytest.approx(0.25)


def test_all_pairs_are_compared() -> None:
    masks = {name: random_mask(0.1, seed) for seed, name in enumerate("xyz")}
    found = disentanglement(masks, CHANNELS, ranking="random", p=0.1)
    assert [(each.left, each.right) for each in found] == [("x", "y"), ("x", "z"), ("y", "z")]


def test_stability_is_the_mean_over_all_pairs() -> None:
    masks = [{"a": torch.arange(100)}, {"a": torch.arange(100)}, {"a": torch.arange(50, 150)}]
    found = stability("x", "seeds", masks, CHANNELS, ranking="r", p=0.1, items=4)
    assert found.share == pytest.approx(2 / 3)
    assert found.lowest == pytest.approx(0.5)


def test_variations_of_the_text() -> None:
    examples = [Example(f"q{number}", f"a{number}") for number in range(9)]
    first, second = halves(examples)
    assert (len(first), len(second)) == (4, 4)
    assert not set(first) & set(second)
    drawn = samples(examples, 3)
    assert [len(sample) for sample in drawn] == [3, 3, 3]
    assert drawn[0] != drawn[1] != drawn[2]
    worded = rewordings(examples)
    assert all(len({texts[number].prompt for texts in worded}) == 3 for number in range(9))
    assert all({texts[number].answer for texts in worded} == {f"a{number}"} for number in range(9))
    assert halves(examples[:1]) == samples(examples[:1], 1) == rewordings([Example(None, "text")]) == []


def sufficiency(**changes: float | bool) -> Sufficiency:
    curves = {CHOSEN: ((0.05, 1.5), (0.1, 1.1)), CHOSEN_TUNED: ((0.05, 1.1), (0.1, 0.9))}
    fields = {"higher_is_better": False, "base": 2.0, "source": 1.0, **changes}
    return Sufficiency(ability="x", task="t", metric="nll", items=3, curves=curves, **fields)  # type: ignore[arg-type]


def test_kept_share_of_the_gain() -> None:
    record = sufficiency()
    assert record.kept_at(CHOSEN, 0.05) == pytest.approx(0.5)
    assert record.kept_at(CHOSEN_TUNED, 0.1) == pytest.approx(1.1)
    assert record.kept_at(CHOSEN, 0.2) is None
    assert smallest_sufficient(record, 0.85) == (0.05, CHOSEN_TUNED)
    assert smallest_sufficient(record, 1.2) is None


def test_source_without_gain_is_not_judged() -> None:
    record = sufficiency(source=2.5)
    assert record.kept(1.0) is None
    assert smallest_sufficient(record, 0.85) is None
