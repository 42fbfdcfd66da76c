"""`act-serve merge`: several abilities as one new ability, or as a merged checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from act_serve.pipeline.merge_abilities import Part
    from act_serve.pipeline.merge_recipe import Recipe

WhatArgument = Annotated[str, typer.Argument(help="fr*0.5+extract, or a YAML recipe with mergekit's keys.")]
OutArgument = Annotated[
    str | None, typer.Argument(help="Name of the new ability; with --to hf, a folder that does not exist yet.")
]
MethodOption = Annotated[
    str | None,
    typer.Option("--method", help="sum (default), mean, ties, dare, dare_ties, priority (the first named wins)."),
]
DensityOption = Annotated[
    float | None, typer.Option("--density", help="Share of each ability's values that ties and dare keep.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of dare's draws. Default: 0.")]
ToOption = Annotated[
    Literal["ability", "hf"], typer.Option("--to", help="ability: a new version in the store; hf: a checkpoint.")
]
StoredOption = Annotated[
    Literal["bfloat16", "int8"], typer.Option("--stored", help="Form of the new ability's rows; int8 is half the size.")
]
DescriptionOption = Annotated[str | None, typer.Option("--description", help="What the new ability is for.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only show how the abilities conflict.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="For --to hf: `embedded` (default), a model folder or a hub id.")
]
StoreOption = Annotated[str, typer.Option("--store", help="Folder or URL of the ability store.")]


def merge(
    what: WhatArgument,
    out: OutArgument = None,
    method: MethodOption = None,
    density: DensityOption = None,
    seed: SeedOption = None,
    to: ToOption = "ability",
    stored: StoredOption = "bfloat16",
    description: DescriptionOption = None,
    dry_run: DryRunOption = False,
    base: BaseOption = None,
    store: StoreOption = "abilities",
) -> None:
    """Merge abilities into a new one or a checkpoint, and show the rows on which they conflict."""
    from rich.console import Console

    from act_serve.abilities.store import open_store
    from act_serve.delta.composition import check_name
    from act_serve.errors import RequestError
    from act_serve.pipeline.merge_abilities import merge_parts, publish_merged, read_parts
    from act_serve.pipeline.publish import published

    recipe = _recipe(what, method, density, seed)
    if out is None and not dry_run:
        raise RequestError("name the new ability, or with --to hf the folder to write, or ask for a --dry-run")
    if out is not None and to == "ability":
        check_name(out)
    parts = read_parts(recipe, open_store(store))
    Console().print(_conflict_table(parts))
    if dry_run or out is None:
        return
    if to == "hf":
        from act_serve.models.loading import resolve_model
        from act_serve.pipeline.compose import check_bases
        from act_serve.pipeline.export import export_hf

        folder = resolve_model(base or recipe.base_model or "embedded")
        check_bases([part.manifest for part in parts], folder)
        export_hf(base=folder, deltas=merge_parts(recipe, parts), folder=Path(out), dtype=recipe.dtype)
        typer.echo(f"checkpoint merged by {recipe.merge_method} written to {out}")
        return
    shelf = open_store(store)
    folder = publish_merged(recipe=recipe, parts=parts, store=shelf, name=out, stored=stored, description=description)
    typer.echo(published(out, folder, shelf))


def _recipe(what: str, method: str | None, density: float | None, seed: int | None) -> "Recipe":
    from act_serve.errors import RequestError
    from act_serve.pipeline.merge_recipe import load_recipe, parse_recipe

    if not what.endswith((".yaml", ".yml")):
        return parse_recipe(what, method=method or "sum", density=density, seed=seed or 0)
    if (method, density, seed) != (None, None, None):
        raise RequestError("--method, --density and --seed are for a composition; the recipe has its own keys for them")
    return load_recipe(Path(what))


def _conflict_table(parts: "list[Part]") -> Any:
    from rich.table import Table

    from act_serve.pipeline.merge_abilities import conflicts

    table = Table(title="conflicts", title_justify="left")
    for heading in ("abilities", "shared rows", "of the smaller", "mean cosine", "most in"):
        table.add_column(heading, justify="left" if heading in ("abilities", "most in") else "right")
    for (left, right), figures in conflicts(parts).items():
        cosine = "-" if figures["cosine"] is None else f"{figures['cosine']:.3f}"
        most = max(figures["modules"].items(), key=lambda item: item[1]["rows"], default=None)
        where = "-"
        if most is not None:
            where = f"{most[0].removeprefix('model.layers.')} ({most[1]['rows']}, {most[1]['cosine']:.2f})"
        table.add_row(f"{left} {right}", f"{figures['rows']:,}", f"{figures['share']:.1%}", cosine, where)
    return table
