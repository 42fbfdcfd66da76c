"""``act-serve ability add|remove|activate|pin``: changes what a store or a running server serves."""

from __future__ import annotations

import json
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from act_serve.cli.ability import StoreOption, UrlOption

if TYPE_CHECKING:
    from act_serve.abilities.store import Store
    from act_serve.delta.manifest import Manifest

KeyOption = Annotated[
    str | None,
    typer.Option("--key", envvar="ACT_SERVE_KEY", help="Key with the role admin, for --url; better in ACT_SERVE_KEY."),
]
NameArgument = Annotated[str, typer.Argument(help="The ability's name.")]
_DEFAULT = "abilities"
_TIMEOUT_S = 600.0
_MAX_BYTES = 1 << 40


def add_ability(
    source: Annotated[Path, typer.Argument(help="Artifact folder, or a zip or tar.gz of one.")],
    activate: Annotated[
        bool, typer.Option("--activate", help="Serve this version to requests that name none.")
    ] = False,
    store: StoreOption = _DEFAULT,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Add a version of an ability."""
    from act_serve.abilities.changes import add, incoming
    from act_serve.abilities.source import fetch
    from act_serve.errors import RequestError

    if not source.exists():
        raise RequestError(f"{source}: no such folder or archive")
    if url:
        with _archive(source) as archive:
            query = "?activate=true" if activate else ""
            done = ask(url, "POST", f"/v1/abilities{query}", key, archive)
        typer.echo(f"added {done['name']}@{done['added']}; active is {done.get('version')}")
        return
    shelf = _store(store)
    with incoming(shelf) as folder:
        fetch(str(source.resolve()), [Path("/")], folder, _MAX_BYTES)
        manifest = add(shelf, folder, _verified, activate=activate)
    typer.echo(f"added {manifest.name}@{manifest.version}; active is {shelf.active(manifest.name)}")


def remove_ability(
    name: NameArgument,
    version: Annotated[int | None, typer.Option("--version", help="Only this one, which must not be active.")] = None,
    now: Annotated[bool, typer.Option("--now", help="Delete the files too; only if nobody serves the store.")] = False,
    store: StoreOption = _DEFAULT,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Serve an ability, or one version, no more; a running server deletes the files a little later."""
    from act_serve.abilities.changes import remove, sweep

    if url:
        path = path_of(name, f"/versions/{version}" if version else "")
        gone = ask(url, "DELETE", path, key)["removed"]
    else:
        gone = remove(_store(store), name, version)
        if now:
            sweep(_store(store), 0)
    typer.echo(f"removed {', '.join(f'{name}@{number}' for number in gone)}")


def activate_ability(
    name: NameArgument,
    version: Annotated[int, typer.Argument(help="What requests get that name no version.")],
    store: StoreOption = _DEFAULT,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Switch to a version, or roll back to one."""
    from act_serve.abilities.changes import activate

    if url:
        ask(url, "POST", path_of(name, "/activate"), key, json.dumps({"version": version}).encode())
    else:
        activate(_store(store), name, version)
    typer.echo(f"active is {name}@{version}")


def pin_ability(
    name: NameArgument,
    off: Annotated[bool, typer.Option("--off", help="Pin it no more.")] = False,
    store: StoreOption = _DEFAULT,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Keep an ability resident in the engines as long as they can."""
    from act_serve.abilities.changes import pin

    if url:
        ask(url, "POST", path_of(name, "/pin"), key, json.dumps({"pinned": not off}).encode())
    else:
        pin(_store(store), name, not off)
    typer.echo(f"{name} is {'not ' if off else ''}pinned")


def _store(place: str) -> Store:
    from act_serve.abilities.store import open_store

    return open_store(place)


def _verified(folder: Path) -> Manifest:
    from act_serve.delta.artifact import read_artifact

    return read_artifact(folder, "the ability")[0]


def _archive(source: Path) -> IO[bytes]:
    """The archive itself, or a folder packed as one."""
    from act_serve.abilities.archive import FILES

    if not source.is_dir():
        return source.open("rb")
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for name in sorted(FILES):
            if (source / name).exists():
                archive.add(source / name, name)
    file.seek(0)
    return file


def path_of(name: str, tail: str = "") -> str:
    """The server's path of an ability."""
    return f"/v1/abilities/{urllib.parse.quote(name, safe='')}{tail}"


def ask(url: str, method: str, path: str, key: str | None, body: bytes | IO[bytes] | None = None) -> dict[str, Any]:
    """What the server answers.

    Raises:
        RequestError: the server refuses; the message is its own.
        StoreError: it cannot be reached, or is no act-serve server.
    """
    from act_serve.errors import RequestError, StoreError

    headers = {"content-type": "application/json" if isinstance(body, bytes) else "application/octet-stream"}
    if body is not None and not isinstance(body, bytes):
        headers["content-length"] = str(body.seek(0, 2))
        body.seek(0)
    try:
        request = urllib.request.Request(url.rstrip("/") + path, body, headers, method=method)
        if key:
            request.add_unredirected_header("authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer
    except urllib.error.HTTPError as exc:
        try:
            message = json.load(exc)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"it answered {exc.code}"
        raise RequestError(f"{url}: {message}") from exc
    except (OSError, ValueError) as exc:
        raise StoreError(f"{url} cannot be asked ({exc}); is it the address of an act-serve server?") from exc
