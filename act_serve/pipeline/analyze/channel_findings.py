"""What the report says about channels: concentration, disentanglement, stability, heat maps."""

from collections.abc import Mapping, Sequence

from act_serve.pipeline.analyze import pictures
from act_serve.pipeline.analyze.concentration import HEADLINE_P, Concentration
from act_serve.pipeline.analyze.disentanglement import Disentanglement
from act_serve.pipeline.analyze.finding import Finding, Verdict, exact, judged, percent, worst
from act_serve.pipeline.analyze.heat_map import HeatMap
from act_serve.pipeline.analyze.overlap import Overlap
from act_serve.pipeline.analyze.stability import Stability


def concentration_finding(records: Sequence[Concentration]) -> Finding:
    """Judges by the share of the summed Δa in the top 5 % of the channels."""
    tops = [record.top_shares[HEADLINE_P] for record in records]
    said = "; ".join(
        f"for {r.ability} the top {exact(HEADLINE_P)} of {r.channels:,} channels carry "
        f"{percent(r.top_shares[HEADLINE_P])} of the summed difference (chance {exact(HEADLINE_P)}), and "
        f"{percent(r.top_shares_in_modules[HEADLINE_P])} once every module is brought to the same scale"
        for r in records
    )
    return Finding(
        key="concentration",
        title="Concentration",
        verdict=worst([judged(top, holds=0.5, partly=0.25) for top in tops]),
        criterion=f"Holds when the top {exact(HEADLINE_P)} of the channels carry at least half of the summed Δa; "
        "partly from a quarter.",
        sentences=(
            "The left curve says how many channels differ by more than x between the base and the ability model on the "
            "same answers; the right one how much of the whole difference the channels with the largest carry.",
            f"{_sentence(said)}; where the second number is much lower, modules with large outputs explain the first.",
        ),
        picture=pictures.draw_concentration(records),
        headings=("ability", "top p of the channels", "share of Δa", "at equal module scale", "chance"),
        rows=tuple(
            (r.ability, exact(p), percent(share), percent(r.top_shares_in_modules[p]), exact(p))
            for r in records
            for p, share in r.top_shares.items()
        ),
    )


def disentanglement_finding(records: Sequence[Disentanglement], ranking: str, p: float) -> Finding:
    """Judges the pair that overlaps most at one p, by the ranking that the builds use."""
    shown = [record for record in records if (record.ranking, record.p) == (ranking, p)]
    highest = max(shown, key=lambda record: record.overlap.share)
    by_ranking = [
        f"{name} {percent(max(r.overlap.share for r in records if (r.ranking, r.p) == (name, p)))}"
        for name in dict.fromkeys(record.ranking for record in records)
    ]
    return Finding(
        key="disentanglement",
        title="Disentanglement",
        verdict=_apart(highest.overlap),
        criterion=f"Holds when by {ranking} at p = {exact(p)} no two abilities share more than twice what "
        "chance gives; partly up to half of the channels.",
        sentences=(
            "Each curve says how many of the channels that one ranking chooses for an ability it also chooses for "
            "another; the dotted line is what two random choices of the same size share.",
            f"By {ranking} at p = {exact(p)}, {highest.left} and {highest.right} share "
            f"{percent(highest.overlap.share)} of their channels where chance gives {percent(highest.overlap.chance)}; "
            f"the highest overlap of two abilities by each ranking is: {', '.join(by_ranking)}.",
        ),
        picture=pictures.draw_disentanglement(records),
        headings=("abilities", "ranking", "p", "rows in common", "share", "chance", "chance within modules"),
        rows=tuple(
            (
                f"{r.left}, {r.right}",
                r.ranking,
                exact(r.p),
                f"{r.overlap.rows:,}",
                percent(r.overlap.share),
                percent(r.overlap.chance),
                percent(r.overlap.chance_in_modules),
            )
            for r in records
        ),
    )


def stability_finding(records: Sequence[Stability], p: float) -> Finding:
    """Judges by the mean overlap at one p of whatever changes the choice most."""
    shown = [record for record in records if record.p == p]
    said = "; ".join(f"{r.ability}, {r.varied}: {percent(r.share)} (chance {percent(r.chance)})" for r in shown)
    return Finding(
        key="stability",
        title="Stability",
        verdict=worst([judged(record.share, holds=0.8, partly=0.5) for record in shown]),
        criterion=f"Holds when at p = {exact(p)} at least {exact(0.8)} of the channels stay in every "
        f"comparison; partly from {exact(0.5)}.",
        sentences=(
            "Each curve says how many of the chosen channels stay the same when only the calibration text changes: "
            "other examples, another draw, or other words around the same questions.",
            f"At p = {exact(p)} by {records[0].ranking} there stay {said}.",
        ),
        picture=pictures.draw_stability(records),
        headings=("ability", "varied", "ranking", "p", "masks", "examples each", "mean overlap", "lowest", "chance"),
        rows=tuple(
            (
                *(r.ability, r.varied, r.ranking, exact(r.p), str(r.masks), str(r.items)),
                *(percent(r.share), percent(r.lowest), percent(r.chance)),
            )
            for r in records
        ),
    )


def heat_map_finding(records: Sequence[HeatMap]) -> Finding:
    """Shows where one ability lies by each ranking, the build's own last; there is nothing to judge."""
    ability, differences = records[0].ability, records[0].differences
    where, at, most = max(_flat(differences), key=lambda cell: cell[2])
    return Finding(
        key=f"layers-{ability}",
        title=f"Layer by module: {ability}",
        verdict=None,
        criterion="",
        sentences=(
            f"Above is the mean activation difference of each module's channels; it is largest, {most:.3g}, in {where} "
            f"of layer {at}.",
            f"Below is where the channels lie that are chosen at p = {exact(records[0].p)}: "
            f"{'; '.join([_lying(record) for record in records])}. The build transfers those of {records[-1].ranking}.",
        ),
        picture=pictures.draw_heat_maps(records),
        headings=("module", "layer", "mean Δa", *(f"chosen by {record.ranking}" for record in records)),
        rows=tuple(
            (name, str(at), f"{value:.4g}", *(percent(record.mask_shares[name][at]) for record in records))
            for name, at, value in _flat(differences)
        ),
    )


def _lying(record: HeatMap) -> str:
    chosen = _flat(record.mask_shares)
    projection, layer, share = max(chosen, key=lambda cell: cell[2])
    empty = sum(value == 0 for _, _, value in chosen)
    return (
        f"by {record.ranking} most densely in {projection} of layer {layer} ({percent(share)} of its channels, chance "
        f"{exact(record.p)}), while {empty} of {len(chosen)} modules have none"
    )


def _apart(shared: Overlap) -> Verdict:
    if shared.share <= 2 * shared.chance:
        return "holds"
    return "holds partly" if shared.share <= 0.5 else "does not hold"


def _flat(grid: Mapping[str, Mapping[int, float]]) -> list[tuple[str, int, float]]:
    return [(name, layer, value) for name, row in grid.items() for layer, value in row.items()]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
