"""`act-serve import`: an ability from a fine-tuned checkpoint or a PEFT adapter, without training."""

from pathlib import Path
from typing import Annotated, Literal

import typer

SourceArgument = Annotated[
    str, typer.Argument(help="Folder of a PEFT LoRA or SHiRA adapter, or a fine-tuned model (a folder or hub id).")
]
NameArgument = Annotated[str, typer.Argument(help="Name of the new ability.")]
BaseOption = Annotated[str, typer.Option("--base", help="The model it was trained from: `embedded`, folder or hub id.")]
ShareOption = Annotated[
    float | None,
    typer.Option(
        "--p",
        min=0.0,
        max=1.0,
        help="Keep at most this share of the linear parameters. "
        "Default: every changed row when half of the weights are unchanged, else 0.05.",
    ),
]
StoredOption = Annotated[
    Literal["bfloat16", "int8"], typer.Option("--stored", help="Form of the rows; int8 is half the size.")
]
KindOption = Annotated[Literal["language", "skill", "other"], typer.Option("--kind", help="What the ability is for.")]
LanguageOption = Annotated[
    list[str] | None, typer.Option("--language", help="BCP 47 tag that a language ability serves; may be repeated.")
]
DescriptionOption = Annotated[str | None, typer.Option("--description", help="One sentence on what it can do.")]
LicenseOption = Annotated[str, typer.Option("--license", help="Licence of the source.")]
StoreOption = Annotated[str, typer.Option("--store", help="Folder or URL of the ability store.")]


def import_ability(
    source: SourceArgument,
    name: NameArgument,
    base: BaseOption = "embedded",
    p: ShareOption = None,
    stored: StoredOption = "bfloat16",
    kind: KindOption = "other",
    language: LanguageOption = None,
    description: DescriptionOption = None,
    license: LicenseOption = "unknown",
    store: StoreOption = "abilities",
) -> None:
    """Make an ability of a fine-tuned checkpoint or a PEFT adapter: exact where few rows change, else the largest."""
    from act_serve.abilities.store import open_store
    from act_serve.delta.composition import check_name
    from act_serve.delta.manifest import read_manifest
    from act_serve.models.loading import resolve_model
    from act_serve.models.pairs import left_out
    from act_serve.pipeline.import_ability import import_ability as publish
    from act_serve.pipeline.publish import published

    shelf = open_store(store)
    folder, said = publish(
        source=source,
        base=resolve_model(base),
        store=shelf,
        stored=stored,
        p=p,
        name=check_name(name),
        kind=kind,
        languages=tuple(language or ()),
        description=description or f"Imported from {Path(source).name}.",
        license=license,
    )
    counts = read_manifest(folder).counts
    kept = "every changed row" if said.exact else "the rows with the largest changes"
    typer.echo(published(name, folder, shelf))
    typer.echo(
        f"{said.form}: kept {kept}, {counts.channels:,} rows, {counts.bytes / 1e6:.1f} MB; "
        f"relative error of the weight change {said.relative_error:.2g}"
    )
    if said.left_out:
        typer.echo(left_out(said.left_out))
