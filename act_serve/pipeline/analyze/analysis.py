"""The paper's findings on a user's own models: everything measured, drawn and said."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, get_args

from act_serve.errors import ProfileError
from act_serve.pipeline.analyze.channel_findings import (
    concentration_finding,
    disentanglement_finding,
    heat_map_finding,
    stability_finding,
)
from act_serve.pipeline.analyze.finding import Finding
from act_serve.pipeline.analyze.measure_channels import (
    measure_concentration,
    measure_disentanglement,
    measure_heat_maps,
    measure_stability,
)
from act_serve.pipeline.analyze.measure_sufficiency import measure_sufficiency
from act_serve.pipeline.analyze.subject import Subject
from act_serve.pipeline.analyze.sufficiency_finding import sufficiency_finding
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.profile.schema import Profile, Ranking

Part = Literal["concentration", "disentanglement", "sufficiency", "stability", "layers"]
PARTS: tuple[Part, ...] = get_args(Part)
COMPARED: tuple[Ranking, ...] = tuple(name for name in RANKINGS if name != "random")
DEFAULT_SHARES = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: the curves at every p of `shares` and of the profiles; at most `items` test examples a task.

    `rankings` are those whose masks are compared between abilities, beside the first profile's own; none named: all of
    `COMPARED` that the models' memory allows.
    """

    shares: tuple[float, ...] = DEFAULT_SHARES
    skip: Set[Part] = frozenset()
    rankings: tuple[Ranking, ...] = ()
    finetuned: bool = True
    items: int | None = None


@dataclass(slots=True)
class Analysis:
    """The findings in the order of the report, the records behind them, and notes on what is missing."""

    findings: list[Finding] = field(default_factory=list)
    records: dict[str, list[object]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, part: Part, finding: Finding, records: Sequence[object]) -> None:
        """Takes up one finding with its records."""
        self.findings.append(finding)
        self.records.setdefault(part, []).extend(records)


def refuse_impossible(profiles: Sequence[Profile], options: Options) -> None:
    """Raises ProfileError when a ranking that was named can't go layer by layer, as a profile's `memory` has it.

    It looks at nothing but the profiles, so that it can be asked before anything runs.
    """
    if len(profiles) < 2 or "disentanglement" in options.skip:
        return
    named = dict.fromkeys([*options.rankings, profiles[0].localize.ranking])
    whole = [ranking for ranking in named if not RANKINGS[ranking].layerwise]
    layerwise = [profile.name for profile in profiles if profile.localize.memory == "layerwise"]
    if whole and layerwise:
        raise ProfileError(
            f"abilities can't be compared by {', '.join(whole)} with `memory: layerwise`, as in the profile of "
            f"{', '.join(layerwise)}; choose another ranking or `memory: together`"
        )


def analyze(subjects: Sequence[Subject], options: Options) -> Analysis:
    """Measures everything that `options` does not skip."""
    found = Analysis()
    shares = sorted({*options.shares, *(each.job.profile.localize.p for each in subjects)})
    if "concentration" not in options.skip:
        spread = [measure_concentration(each, shares) for each in subjects]
        found.add("concentration", concentration_finding(spread), spread)
    if "disentanglement" not in options.skip:
        _disentanglement(found, subjects, shares, options.rankings)
    if "sufficiency" not in options.skip:
        for each in subjects:
            scored = measure_sufficiency(each, shares, finetuned=options.finetuned, items=options.items)
            found.add("sufficiency", sufficiency_finding(scored), scored)
    if "stability" not in options.skip:
        _stability(found, subjects, shares)
    if "layers" not in options.skip:
        for each in subjects:
            lying = measure_heat_maps(each)
            found.add("layers", heat_map_finding(lying), lying)
    return found


def _disentanglement(
    found: Analysis, subjects: Sequence[Subject], shares: Sequence[float], rankings: Sequence[Ranking]
) -> None:
    if len(subjects) < 2:
        found.notes.append("Disentanglement needs two abilities or more: give several profiles.")
        return
    settings = subjects[0].job.profile.localize
    ranking = subjects[0].text_ranking if settings.ranking == "random" else settings.ranking
    if not rankings:
        rankings = _possible(found, subjects, ranking)
    pairs = measure_disentanglement(subjects, shares, list(dict.fromkeys([ranking, *rankings])))
    found.add("disentanglement", disentanglement_finding(pairs, ranking, settings.p), pairs)


def _possible(found: Analysis, subjects: Sequence[Subject], own: Ranking) -> list[Ranking]:
    """`COMPARED`, where an ability's models go layer by layer without what can't; `own`, the build's, stays."""
    layerwise = [each.name for each in subjects if each.layerwise]
    left_out = [name for name in COMPARED if layerwise and not RANKINGS[name].layerwise and name != own]
    if left_out:
        found.notes.append(
            f"The abilities are not compared by {', '.join(left_out)}, which holds a whole model in memory: the models "
            f"of {', '.join(layerwise)} go one layer at a time. Where they fit, `localize.memory: together` adds it."
        )
    return [name for name in COMPARED if name not in left_out]


def _stability(found: Analysis, subjects: Sequence[Subject], shares: Sequence[float]) -> None:
    records = [record for each in subjects for record in measure_stability(each, shares)]
    if records:
        found.add("stability", stability_finding(records, subjects[0].job.profile.localize.p), records)
    else:
        found.notes.append("Stability needs at least two calibration examples.")
    for each in subjects:
        if each.text_ranking != each.job.profile.localize.ranking:
            found.notes.append(
                f"{each.name} is built by {each.job.profile.localize.ranking}, which reads no text and so cannot vary "
                f"with it; its stability is measured for {each.text_ranking}."
            )
