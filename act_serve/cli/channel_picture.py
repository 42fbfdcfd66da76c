"""Layer by module pictures of an ability: in the terminal and as PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from act_serve.errors import MissingExtraError

if TYPE_CHECKING:
    from act_serve.delta.artifact import ModuleDelta
    from act_serve.delta.manifest import Manifest

SHADES = " ░▒▓█"
Grid = Mapping[str, Mapping[int, float]]  # by projection, then by layer


def channel_shares(manifest: "Manifest") -> Grid:
    """Share of each module's channels that the ability changes."""
    return _grid({name: entry.rows / entry.out_features for name, entry in manifest.modules.items()})


def change_sizes(deltas: Mapping[str, "ModuleDelta"]) -> Grid:
    """Root mean square of each module's changes."""
    return _grid({name: float(delta.delta.float().square().mean().sqrt()) for name, delta in deltas.items()})


def lines(grid: Grid) -> list[str]:
    """One line per projection, one character per layer, the darkest for the highest value."""
    highest = max(value for layers in grid.values() for value in layers.values())
    last, width = _last_layer(grid), max(10, *map(len, grid))
    return [
        f"{projection:>{width}} │{''.join(_shade(layers.get(layer, 0.0), highest) for layer in range(last + 1))}│"
        for projection, layers in grid.items()
    ]


def draw(grids: Mapping[str, Grid], title: str, path: Path) -> None:
    """Draws one heat map per titled grid into a PNG file; raises MissingExtraError without matplotlib."""
    try:
        import matplotlib
    except ImportError as exc:
        raise MissingExtraError("matplotlib", "build") from exc
    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = max(_last_layer(grid) for grid in grids.values())
    size = (2 + 0.3 * (last + 1), 0.5 + 2.8 * len(grids))
    figure, axes = pyplot.subplots(len(grids), figsize=size, layout="constrained", squeeze=False)
    for axis, (caption, grid) in zip(axes[:, 0], grids.items(), strict=True):
        cells = [[layers.get(layer, 0.0) for layer in range(last + 1)] for layers in grid.values()]
        figure.colorbar(axis.imshow(cells, aspect="auto", cmap="viridis", vmin=0), ax=axis)
        axis.set_yticks(range(len(grid)), list(grid))
        axis.set_xlabel("layer")
        axis.set_title(caption)
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)


def _grid(values: Mapping[str, float]) -> Grid:
    found: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        parts = name.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), 0)
        found.setdefault(parts[-1], {})[layer] = value
    return found


def _last_layer(grid: Grid) -> int:
    return max(layer for layers in grid.values() for layer in layers)


def _shade(value: float, highest: float) -> str:
    if value == 0.0:
        return SHADES[0]
    return SHADES[max(1, round(value / highest * (len(SHADES) - 1)))]
