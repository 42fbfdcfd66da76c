"""``act-serve key``: makes API keys."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

key = typer.Typer(help="Make API keys for a server.", no_args_is_help=True)

RoleOption = Annotated[
    list[str], typer.Option("--role", help="infer asks the model, admin changes what is served; may be repeated.")
]
AbilitiesOption = Annotated[
    str | None, typer.Option("--abilities", help="Only these, such as fr,extract; '' is the base alone. Default: all.")
]
IdOption = Annotated[str | None, typer.Option("--id", help="What logs and messages call it. Default: a random name.")]
RateOption = Annotated[
    float | None, typer.Option("--requests-per-minute", help="In the long run, on each router. Default: no limit.")
]
BurstOption = Annotated[int | None, typer.Option("--burst", help="At most at once. Default: those of one minute.")]


@key.callback()
def _group() -> None: ...


@key.command("new")
def new(
    role: RoleOption,
    abilities: AbilitiesOption = None,
    id: IdOption = None,
    requests_per_minute: RateOption = None,
    burst: BurstOption = None,
) -> None:
    """Print a new key, this once, on stderr, and its line of the keys file on stdout: >> keys.yaml adds it."""
    from act_serve.server.keys_file import new_key, parse_keys

    secret, digest = new_key()
    entry: dict[str, Any] = {"id": id or f"key-{digest[:8]}", "sha256": digest, "roles": role}
    if abilities is not None:
        entry["abilities"] = [name.strip() for name in abilities.split(",") if name.strip()]
    if requests_per_minute is not None:
        entry["requests_per_minute"] = requests_per_minute
    if burst is not None:
        entry["burst"] = burst
    parse_keys([entry], "act-serve key new")
    typer.echo(f"the key, shown this once: {secret}", err=True)
    typer.echo(f"- {json.dumps(entry)}")
