"""``act-serve ability show``: one ability, and where every engine of a server stands with it."""

from __future__ import annotations

import json
from typing import Any

import typer

from act_serve.cli.ability import JsonOption, KeyOption, StoreOption, UrlOption
from act_serve.cli.change_ability import NameArgument, ask, path_of

_LISTED = ("status", "damage", "version", "versions", "draining", "pinned", "kind", "languages", "description")


def show_ability(
    name: NameArgument,
    store: StoreOption = "abilities",
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show an ability; with --url also the state of its versions in every engine."""
    shown = ask(url, "GET", path_of(name), key) if url else _of_store(store, name)
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
        return
    typer.echo(name)
    for field in _LISTED:
        if shown.get(field) not in (None, [], ""):
            value = shown[field]
            typer.echo(f"  {field:<12} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    if shown.get("replicas"):
        _print_replicas(shown["replicas"])


def _of_store(store: str, name: str) -> dict[str, Any]:
    from act_serve.abilities.catalogue import Catalogue, details
    from act_serve.abilities.store import open_store

    return details(Catalogue(open_store(store)).refresh().ability(name))


def _print_replicas(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("version", "replica", "state", "requests", "waiting", "MB in memory")
    for row in sorted(rows, key=lambda row: (row["version"], row["replica"])):
        counts = [str(row.get(count, "")) for count in ("requests", "waiting")]
        size = f"{row['resident_bytes'] / 1e6:.1f}" if row.get("resident_bytes") else ""
        table.add_row(str(row["version"]), row["replica"], row["state"], *counts, size)
    Console().print(table)
