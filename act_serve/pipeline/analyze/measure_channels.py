"""Runs the measurements that need no scoring: concentration, disentanglement, stability, heat maps."""

from collections.abc import Sequence

from act_serve.models.examples import Example
from act_serve.pipeline.analyze.concentration import HEADLINE_P, Concentration, concentration
from act_serve.pipeline.analyze.disentanglement import Disentanglement, disentanglement
from act_serve.pipeline.analyze.heat_map import HeatMap, heat_map
from act_serve.pipeline.analyze.stability import Stability, halves, rewordings, samples, stability
from act_serve.pipeline.analyze.subject import Subject
from act_serve.profile.schema import Ranking

POOL = 4  # times the calibration examples: what samples are drawn from


def measure_concentration(subject: Subject, shares: Sequence[float]) -> Concentration:
    """Measures Δa on the build's own calibration text."""
    differences = subject.differences(subject.calibration, "activation_global")
    return concentration(subject.name, differences, sorted({*shares, HEADLINE_P}))


def measure_disentanglement(
    subjects: Sequence[Subject], shares: Sequence[float], rankings: Sequence[Ranking]
) -> list[Disentanglement]:
    """Compares all pairs of abilities, for every ranking and p."""
    found = []
    for ranking in rankings:
        scores = {each.name: each.differences(each.calibration, ranking) for each in subjects}
        for p in shares:
            masks = {each.name: each.mask(scores[each.name], ranking, p) for each in subjects}
            found += disentanglement(masks, subjects[0].channels, ranking=ranking, p=p)
    return found


def measure_stability(subject: Subject, shares: Sequence[float]) -> list[Stability]:
    """Compares the masks of other halves, samples and wordings of the calibration text, where there are any."""
    calibration, job = subject.calibration, subject.job
    pool = job.examples("train", POOL * len(calibration))
    variations = {
        "halves of the examples": halves(calibration),
        "samples of 3 seeds": samples(pool, len(calibration)),
        "3 wordings of the prompt": rewordings(calibration),
    }
    return [
        record for varied, texts in variations.items() if texts for record in _varied(subject, varied, texts, shares)
    ]


def measure_heat_maps(subject: Subject) -> list[HeatMap]:
    """Sums up Δa, and the masks of the paper's ranking and of the build's own, which comes last.

    One that ranks within modules chooses alike in all of them.
    """
    settings = subject.job.profile.localize
    rankings: tuple[Ranking, ...] = ("activation_global", settings.ranking)
    differences = subject.differences(subject.calibration, "activation_global")
    return [
        heat_map(
            subject.name,
            differences,
            subject.mask(subject.differences(subject.calibration, ranking), ranking, settings.p),
            ranking=ranking,
            p=settings.p,
        )
        for ranking in dict.fromkeys(rankings)
    ]


def _varied(
    subject: Subject, varied: str, texts: Sequence[Sequence[Example]], shares: Sequence[float]
) -> list[Stability]:
    ranking = subject.text_ranking
    scores = [subject.differences(text, ranking) for text in texts]
    return [
        stability(
            subject.name,
            varied,
            [subject.mask(each, ranking, p) for each in scores],
            subject.channels,
            ranking=ranking,
            p=p,
            items=len(texts[0]),
        )
        for p in shares
    ]
