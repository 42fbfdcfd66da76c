"""The report's pictures, each a PNG file."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from act_serve.pipeline.analyze.concentration import Concentration
from act_serve.pipeline.analyze.disentanglement import Disentanglement
from act_serve.pipeline.analyze.drawing import GREY, MARKERS, new_figure, p_axis, per_cent, plain_log, png, style
from act_serve.pipeline.analyze.heat_map import HeatMap
from act_serve.pipeline.analyze.stability import Stability
from act_serve.pipeline.analyze.sufficiency import CHOSEN, CHOSEN_TUNED, RANDOM, RANDOM_TUNED, Sufficiency

_CURVES = {CHOSEN: ("#0072B2", "--"), CHOSEN_TUNED: ("#0072B2", "-"), RANDOM: ("#D55E00", "--")}
_CURVES |= {RANDOM_TUNED: ("#D55E00", "-")}


def draw_concentration(records: Sequence[Concentration]) -> bytes:
    """CCDF of Δa, and the share of its sum against the share of the channels."""
    figure, (left, right) = new_figure(1, 2, width=5.2, height=4.0)
    for index, record in enumerate(records):
        line: dict[str, Any] = {"label": record.ability, "color": style(index)["color"], "linewidth": 2}
        left.plot(*zip(*record.ccdf, strict=True), **line)
        right.plot(*zip(*record.curve, strict=True), **line)
    left.set_xscale("log")
    plain_log(left)
    left.set_xlim(left=min(x for record in records for x, above in record.ccdf if above < 0.99 and x > 0))
    left.set_xlabel("x: activation difference Δa (activation units)")
    left.set_ylabel("channels with Δa > x (%)")
    even = [at for at, _ in records[0].curve]
    right.plot(even, even, color=GREY, linestyle=":", label="chance: evenly spread")
    p_axis(right, (1e-5, 1e-4, 0.001, 0.01, 0.05, 0.2, 1.0), "share of the channels, largest Δa first (%)")
    per_cent(right, "share of the summed Δa (%)")
    right.legend(frameon=False, loc="upper left")
    return png(figure)


def draw_disentanglement(records: Sequence[Disentanglement]) -> bytes:
    """Mean overlap of all pairs of abilities against p, one line per ranking, the band from lowest to highest."""
    figure, (axis,) = new_figure(1, 1, width=7.6, height=4.2)
    shares = tuple(sorted({record.p for record in records}))
    for index, ranking in enumerate(dict.fromkeys(record.ranking for record in records)):
        found = [[r.overlap.share for r in records if (r.ranking, r.p) == (ranking, p)] for p in shares]
        axis.plot(shares, [sum(each) / len(each) for each in found], label=ranking, **style(index))
        band = [min(each) for each in found], [max(each) for each in found]
        axis.fill_between(shares, *band, color=style(index)["color"], alpha=0.15, linewidth=0)
    chance = [_mean([r.overlap.chance for r in records if r.p == p]) for p in shares]
    axis.plot(shares, chance, color=GREY, linestyle=":", label="chance")
    p_axis(axis, shares)
    per_cent(axis, "channels in common (%)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return png(figure)


def draw_sufficiency(records: Sequence[Sufficiency]) -> bytes:
    """Score against p of one ability, one panel per task; base and ability model as lines."""
    columns = min(2, len(records))
    figure, axes = new_figure(-(-len(records) // columns), columns, width=5.2, height=3.7)
    for axis, record in zip(axes, records, strict=False):
        axis.axhline(record.source, color="#000000", linewidth=1.3, label="ability model")
        axis.axhline(record.base, color=GREY, linewidth=1.3, linestyle=":", label="base model")
        for name, points in record.curves.items():
            colour, line = _CURVES[name]
            marker = MARKERS[0] if name in (CHOSEN, CHOSEN_TUNED) else MARKERS[1]
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker=marker, label=name)
        p_axis(axis, tuple(p for p, _ in next(iter(record.curves.values()))))
        bottom, top = axis.get_ylim()
        axis.set_ylim(bottom=max(bottom, -0.04 * top))  # no metric is below 0
        axis.set_ylabel(f"{record.metric} ({'higher' if record.higher_is_better else 'lower'} is better)")
        axis.set_title(f"{record.task}, {record.items} examples", fontsize=10)
    for axis in axes[len(records) :]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return png(figure)


def draw_stability(records: Sequence[Stability]) -> bytes:
    """Overlap against p, one panel for each thing that was varied, one line per ability."""
    varied = list(dict.fromkeys(record.varied for record in records))
    figure, axes = new_figure(1, len(varied), width=4.0, height=4.0)
    abilities = list(dict.fromkeys(record.ability for record in records))
    for axis, name in zip(axes, varied, strict=True):
        for index, ability in enumerate(abilities):
            found = sorted((r for r in records if (r.varied, r.ability) == (name, ability)), key=lambda r: r.p)
            shares = [record.p for record in found]
            axis.plot(shares, [record.share for record in found], label=ability, **style(index))
            axis.plot(shares, [record.chance for record in found], color=GREY, linestyle=":")
        p_axis(axis, tuple(record.p for record in records), "p (% of the parameters)")
        per_cent(axis, "channels in common (%)")
        axis.set_title(name, fontsize=10)
    axes[0].plot([], [], color=GREY, linestyle=":", label="chance")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return png(figure)


def draw_heat_maps(records: Sequence[HeatMap]) -> bytes:
    """Layer by module: mean Δa (logarithmic colours) above, below each other the share of each ranking's channels."""
    differences = records[0].differences
    layers = 1 + max(layer for row in differences.values() for layer in row)
    width = max(6.0, 2.4 + 0.26 * layers)
    figure, (above, *below) = new_figure(1 + len(records), 1, width=width, height=2.9)
    values = [value for row in differences.values() for value in row.values() if value > 0]
    scale = LogNorm(min(values), max(values)) if values and min(values) < max(values) else Normalize(0, 1)
    _cells(above, differences, scale, "mean Δa (activation units)")
    for axis, record in zip(below, records, strict=True):
        in_per_cent = {name: {at: 100 * v for at, v in row.items()} for name, row in record.mask_shares.items()}
        shares = [value for row in in_per_cent.values() for value in row.values()]
        title = f"channels chosen by {record.ranking} at p = {100 * record.p:g} % (% of the module's)"
        _cells(axis, in_per_cent, Normalize(0, max(*shares, 1e-9)), title)
    return png(figure)


def _cells(axis: Axes, grid: Mapping[str, Mapping[int, float]], scale: Normalize, title: str) -> None:
    layers = 1 + max(layer for row in grid.values() for layer in row)
    cells = [[row.get(layer, float("nan")) for layer in range(layers)] for row in grid.values()]
    axis.grid(False)
    axis.figure.colorbar(axis.imshow(cells, aspect="auto", cmap="cividis", norm=scale), ax=axis, pad=0.01)
    axis.set_yticks(range(len(grid)), list(grid))
    axis.set_xticks(range(0, layers, 1 if layers <= 16 else 5))
    axis.set_xlabel("layer")
    axis.set_title(title, fontsize=10, loc="left")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
