"""``act-serve ability``: the abilities of a store or of a running server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer

ability = typer.Typer(help="See and change the abilities of a store or of a running server.", no_args_is_help=True)

StoreOption = Annotated[str, typer.Option("--store", help="Folder or URL of the ability store.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="Ask this server instead, e.g. http://127.0.0.1:8000.")]
KeyOption = Annotated[
    str | None, typer.Option("--key", envvar="ACT_SERVE_KEY", help="Key for --url, where it wants one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_TIMEOUT_S = 10.0


@ability.callback()
def _group() -> None: ...


@ability.command("list")
def list_abilities(
    store: StoreOption = "abilities",
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List abilities: active version, kind, languages, size, and whether each is in order."""
    rows = abilities_of_server(url, key) if url else _of_store(store)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif not rows:
        from act_serve.abilities.location import shown

        typer.echo(f"no abilities in {url or shown(store)}")
    else:
        _print_table(rows)


def _of_store(store: str) -> list[dict[str, Any]]:
    from act_serve.abilities.catalogue import Catalogue, summary
    from act_serve.abilities.location import shown
    from act_serve.abilities.store import open_store

    catalogue = Catalogue(open_store(store))
    entries = catalogue.refresh().entries.values()
    if catalogue.stale_s is not None:
        typer.echo(f"{shown(store)} cannot be read; this is what is cached of it", err=True)
    return [summary(entry) for entry in entries]


def abilities_of_server(url: str, key: str | None) -> list[dict[str, Any]]:
    """What ``GET /v1/abilities`` lists.

    Raises:
        StoreError: nothing answers there, or something that is not act-serve, or it wants another key.
    """
    from act_serve.errors import StoreError

    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/v1/abilities")
        if key:
            request.add_unredirected_header("authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            rows: list[dict[str, Any]] = json.load(reply)["data"]
            return rows
    except urllib.error.HTTPError as exc:
        hint = "; give a key with --key or ACT_SERVE_KEY" if exc.code in (401, 403) else ""
        raise StoreError(f"{url} does not list abilities (status {exc.code}){hint}") from exc
    except (urllib.error.URLError, ValueError, KeyError, TimeoutError) as exc:
        raise StoreError(f"{url} does not list abilities ({exc}); is it the address of an act-serve server?") from exc


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "version", "kind", "languages", "MB", "status", "description")
    for row in rows:
        size = f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else ""
        status = row["status"] if row["damage"] is None else f"{row['status']}: {row['damage']}"
        languages = ", ".join(row["languages"])
        table.add_row(row["name"], str(row["version"]), row["kind"], languages, size, status, row["description"])
    Console().print(table)
