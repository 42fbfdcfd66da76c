"""`act-serve export`: a base with abilities as an ordinary checkpoint."""

from pathlib import Path
from typing import Annotated, Literal

import typer

CompositionArgument = Annotated[str, typer.Argument(help="Composition such as fr or fr+extract*0.5.")]
FolderArgument = Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")]
FormatOption = Annotated[Literal["hf"], typer.Option("--to", help="hf: merged checkpoint for transformers.")]
BaseOption = Annotated[str, typer.Option("--base", help="`embedded`, a model folder or a hub id.")]
StoreOption = Annotated[Path, typer.Option("--store", help="Folder of the ability store.")]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, typer.Option("--dtype", help="Default: the base's.")
]


def export(
    abilities: CompositionArgument,
    folder: FolderArgument,
    to: FormatOption = "hf",
    base: BaseOption = "embedded",
    store: StoreOption = Path("abilities"),
    dtype: DtypeOption = None,
) -> None:
    """Write the base with abilities merged into it as a checkpoint."""
    from act_serve.models.loading import resolve_model
    from act_serve.pipeline.compose import artifacts_of
    from act_serve.pipeline.export import export_hf

    chosen = artifacts_of(abilities, store)
    export_hf(base=resolve_model(base), abilities=chosen, folder=folder, dtype=dtype)
    typer.echo(f"{to} checkpoint of {base} + {abilities} written to {folder}")
