"""Intervals cover what they should, and paired differences are tighter than two intervals apart."""

import random
import tracemalloc

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF
from scipy import stats

from act_serve.pipeline.measured import RESAMPLES, Measured, _counts, _resampled, combined, difference
from act_serve.pipeline.scorers import answer_numbers


def hits(values: list[bool]) -> Measured:
    return Measured("exact_match", [[float(value), 1.0] for value in values])


def test_interval_agrees_with_the_binomial_one() -> None:
    measured = hits([True] * 60 + [False] * 140)
    low, high = measured.interval
    exact = stats.binomtest(60, 200).proportion_ci(0.95, method="wilson")
    assert measured.score == 0.3
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.015)
    assert measured.interval == hits([True] * 60 + [False] * 140).interval


def test_interval_of_a_pooled_ratio_weighs_long_items_more() -> None:
    draw = random.Random(0)
    items = [
        [nats * tokens, float(tokens)]
        for nats, tokens in ((draw.gauss(2, 0.5), draw.randint(5, 50)) for _ in range(200))
    ]
    nll, perplexity = Measured("nll", items), Measured("perplexity", items)
    rows = np.array(items)
    wanted = stats.bootstrap(
        (rows[:, 0], rows[:, 1]),
        lambda nats, tokens, axis: nats.sum(axis) / tokens.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert nll.interval == pytest.approx((wanted.low, wanted.high), abs=0.01)
    assert perplexity.interval == pytest.approx(tuple(np.exp(nll.interval)), rel=1e-3)


def test_chrf_is_resampled_as_the_corpus_metric_it_is() -> None:
    given = [f"le chat numéro {index} dort" for index in range(30)] + ["rien"] * 10
    wanted = [f"le chat numéro {index} dort bien" for index in range(30)] + ["une tout autre phrase"] * 10
    measured = Measured("chrf", answer_numbers("chrf", given, wanted, None))
    assert measured.score == pytest.approx(CHRF().corpus_score(given, [wanted]).score)
    low, high = measured.interval
    theirs = CHRF().corpus_score(given, [wanted], n_bootstrap=1000)
    assert low < measured.score < high
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.15)


def test_paired_difference_is_zero_for_equal_results_and_tight_for_like_ones() -> None:
    draw = random.Random(1)
    before = [draw.random() < 0.5 for _ in range(300)]
    after = [value if index % 30 else True for index, value in enumerate(before)]
    assert difference(hits(before), hits(before)) == (0.0, (0.0, 0.0))
    change, (low, high) = difference(hits(after), hits(before))
    assert low < change < high
    apart = hits(after).interval
    assert high - low < (apart[1] - apart[0]) / 2
    with pytest.raises(ValueError, match="can't be paired"):
        difference(hits(before), hits(before[:-1]))


def test_a_share_is_resampled_with_all_its_parts() -> None:
    base, whole, part = hits([False] * 200), hits([True] * 160 + [False] * 40), hits([True] * 120 + [False] * 80)

    def share(low: float, high: float, found: float) -> float:
        return (found - low) / (high - low)

    value, (low, high) = combined(share, base, whole, part)
    assert value == pytest.approx(0.75)
    assert 0.6 < low < 0.75 < high < 0.9


@pytest.mark.parametrize("count", [7, 300, 3500])
def test_resamples_drawn_in_slices_are_those_of_one_call(count: int) -> None:
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=RESAMPLES)
    assert np.array_equal(_counts(count), drawn)
    values = np.random.default_rng(1).normal(2, 1, (count, 2)).round(3) ** 2
    sums = drawn.astype(np.float64) @ np.asarray(values.tolist())
    assert np.array_equal(_resampled(Measured("nll", values.tolist())), sums[:, 0] / sums[:, 1])


def test_many_items_take_little_memory() -> None:
    measured = hits([True, False] * 4000)
    tracemalloc.start()
    try:
        assert measured.interval[0] < 0.5 < measured.interval[1]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20  # 128 MB of counts, were they 64-bit numbers
    finally:
        tracemalloc.stop()
        _counts.cache_clear()
