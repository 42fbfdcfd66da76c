"""`act-serve export`: a base with abilities, or the abilities alone, in the formats of other tools."""

from pathlib import Path
from typing import Annotated, Literal

import typer

CompositionArgument = Annotated[str, typer.Argument(help="Composition such as fr or fr+extract*0.5.")]
FolderArgument = Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")]
FormatOption = Annotated[
    Literal["hf", "peft", "vllm-patch"],
    typer.Option(
        "--to",
        help="hf: merged checkpoint for transformers; peft: the LoRA adapter that equals the composition; "
        "vllm-patch: sparse patches for vLLM's checkpoint weight patch loader.",
    ),
]
BaseOption = Annotated[str, typer.Option("--base", help="`embedded`, a model folder or a hub id.")]
StoreOption = Annotated[str, typer.Option("--store", help="Folder or URL of the ability store.")]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Default: the base's; for peft, the smallest that is exact."),
]


def export(
    abilities: CompositionArgument,
    folder: FolderArgument,
    to: FormatOption = "hf",
    base: BaseOption = "embedded",
    store: StoreOption = "abilities",
    dtype: DtypeOption = None,
) -> None:
    """Write a base with abilities as a checkpoint, or the abilities as an exact LoRA or as vLLM weight patches."""
    from act_serve.errors import RequestError
    from act_serve.models.loading import resolve_model
    from act_serve.pipeline.compose import artifacts_of, compose

    chosen = artifacts_of(abilities, store)
    if to != "hf" and not chosen:
        raise RequestError(f"--to {to} needs at least one ability", param="abilities")
    model = resolve_model(base)
    deltas = compose(chosen, model)
    if to == "hf":
        from act_serve.pipeline.export import export_hf

        export_hf(base=model, deltas=deltas, folder=folder, dtype=dtype)
    elif to == "peft":
        from act_serve.pipeline.export_peft import export_peft
        from act_serve.pipeline.publish import channel_counts

        export_peft(base=str(model), deltas=deltas, channels=channel_counts(model), folder=folder, dtype=dtype)
    else:
        from act_serve.pipeline.export_patch import export_patch

        if dtype is not None:
            raise RequestError("a vllm-patch has the base's dtypes; leave --dtype out")
        export_patch(base=model, deltas=deltas, folder=folder)
    typer.echo(f"{to} form of {base} + {abilities or 'no ability'} written to {folder}")
