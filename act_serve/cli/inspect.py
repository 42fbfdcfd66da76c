"""`act-serve inspect`: what an ability artifact is, and where in the model its channels lie."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from act_serve.errors import RequestError

if TYPE_CHECKING:
    from act_serve.delta.manifest import Manifest

ArtifactArgument = Annotated[Path, typer.Argument(help="Artifact folder, such as abilities/fr/3.")]
PngOption = Annotated[Path | None, typer.Option("--png", help="Also draw the pictures into this file.")]


def inspect(artifact: ArtifactArgument, png: PngOption = None) -> None:
    """Check an ability artifact and show its manifest, its scores and where in the model its channels lie."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from act_serve.cli.channel_picture import change_sizes, channel_shares, draw, lines
    from act_serve.delta.artifact import read_artifact
    from act_serve.pipeline.score_table import score_table

    manifest, deltas = read_artifact(artifact)
    console = Console()
    facts = Table(show_header=False, title=f"{manifest.name}@{manifest.version}", title_justify="left")
    for name, value in _facts(manifest):
        facts.add_row(name, escape(value))
    console.print(facts)
    if manifest.scores:
        console.print(score_table("held-out scores", manifest.scores))
    grids = {"share of changed channels": channel_shares(manifest), "size of the changes": change_sizes(deltas)}
    for caption, grid in grids.items():
        console.print(f"\n{caption}, one column per layer", highlight=False)
        console.print("\n".join(lines(grid)), highlight=False)
    if png is not None:
        try:
            png.parent.mkdir(parents=True, exist_ok=True)
            draw(grids, f"{manifest.name}@{manifest.version}", png)
        except OSError as exc:
            said = f"the pictures can't be written to {png}: {exc.strerror}; give another file with --png"
            raise RequestError(said) from exc
        console.print(f"\npictures written to {png}")


def _facts(manifest: "Manifest") -> list[tuple[str, str]]:
    counts = manifest.counts
    languages = f" ({', '.join(manifest.languages)})" if manifest.languages else ""
    return [
        ("kind", f"{manifest.kind}{languages}"),
        ("description", manifest.description),
        ("licence", manifest.license),
        ("base", f"{manifest.base} ({manifest.base_fingerprint.architecture})"),
        ("source", manifest.source or "-"),
        ("channels", f"{counts.channels:,} in {len(manifest.modules)} modules, {counts.parameters:,} parameters"),
        ("size", f"{counts.bytes / 1e6:.1f} MB, rows stored as {manifest.stored}"),
        *_origin(manifest),
        ("content", manifest.digest),
        ("built", manifest.created),
    ]


def _origin(manifest: "Manifest") -> list[tuple[str, str]]:
    facts = []
    if how := manifest.localization:
        of = " + ".join(("linear", *how.include))
        facts.append(("localized by", f"{how.ranking}, p = {how.p:g} of {of}, λ = {how.strength:g}, seed {how.seed}"))
        facts.append(("fine-tuned", f"{how.fine_tune_steps} steps on these rows alone"))
    if merge := manifest.merge:
        parents = " + ".join(f"{p.name}@{p.version}*{p.weight:g}" for p in merge.parents)
        facts.append(("merged from", f"{parents} by {merge.method}, seed {merge.seed}"))
    if given := manifest.imported:
        kept = "every changed row kept" if given.exact else "the largest rows kept"
        facts.append(("imported from", f"{given.form}, {kept}, relative error {given.relative_error:.2g}"))
    return facts
