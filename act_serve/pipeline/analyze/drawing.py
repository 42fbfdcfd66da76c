"""How all pictures of the report look: figures, axes in per cent, and colours that colour-blind readers tell apart."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without the two that are faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#767676"


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` times `columns` panels of `width` by `height` inches, row by row."""
    figure = Figure(figsize=(columns * width, rows * height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(True, color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the line number `index`; no two of the first seven share either."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def p_axis(axis: Axes, shares: tuple[float, ...], label: str = "p: share of the parameters chosen (%)") -> None:
    """Makes the x axis logarithmic with a tick at every measured p."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(_apart(shares)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(label)


def per_cent(axis: Axes, label: str) -> None:
    """Makes the y axis run from 0 to 100 %."""
    axis.set_ylim(-0.02, 1.04)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    axis.set_ylabel(label)


def plain_log(axis: Axes) -> None:
    """Writes a logarithmic y axis of shares in per cent."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _apart(shares: tuple[float, ...]) -> list[float]:
    """The shares whose labels don't touch each other on a logarithmic axis."""
    kept: list[float] = []
    for share in sorted(set(shares), reverse=True):
        if not kept or kept[-1] / share >= 1.3:
            kept.append(share)
    return kept
