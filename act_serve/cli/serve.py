"""``act-serve serve``: router and engine on this machine, from start to a clean end."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from act_serve.server.config import ServerSettings

ModelOption = Annotated[
    Path | None, typer.Option("--model", help="Folder of the base checkpoint. Default: the embedded SmolLM2-135M.")
]
NameOption = Annotated[str | None, typer.Option("--served-model-name", help="Name that clients use for the base.")]
StoreOption = Annotated[str, typer.Option("--store", help="Folder or URL of the ability store.")]
HostOption = Annotated[str, typer.Option("--host", help="Interface to listen on.")]
PortOption = Annotated[int, typer.Option("--port", min=1, max=65534, help="Port to listen on.")]
DefaultOption = Annotated[
    str, typer.Option("--default-abilities", help="For requests that name none: none, auto or fr+math*0.5.")
]
KeysOption = Annotated[
    Path | None,
    typer.Option("--keys", envvar="ACT_SERVE_KEYS", help="File of the API keys. Default: everybody may ask."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any other server setting, KEY=VALUE; may be repeated.")
]


def serve(
    model: ModelOption = None,
    served_model_name: NameOption = None,
    store: StoreOption = "abilities",
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    default_abilities: DefaultOption = "none",
    keys: KeysOption = None,
    settings: SetOption = None,
) -> None:
    """Start router and engine on this machine; Ctrl-C stops everything."""
    from act_serve.abilities.location import absolute
    from act_serve.server.config import read_settings

    given = {
        "model": model,
        "served_model_name": served_model_name,
        "store": absolute(store),
        "default_abilities": default_abilities,
        "keys": keys and keys.absolute(),
        "engine_host": "127.0.0.1",
        **dict(_split(text) for text in settings or []),
    }
    checked = read_settings({key: value for key, value in given.items() if value is not None})
    _check_port(host, port)
    _run(checked, host, port)


def _run(settings: ServerSettings, host: str, port: int) -> None:
    from act_serve.cli.progress_line import ProgressLine
    from act_serve.server.keys_file import read_keys_file
    from act_serve.server.model_source import check_default_abilities, model_source
    from act_serve.server.ray_local import local_application

    if settings.keys is not None:
        read_keys_file(settings.keys)
    _, base = model_source(settings)
    check_default_abilities(settings)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    start = time.monotonic()
    try:
        with ProgressLine() as line, local_application(settings, host, port, line.say):
            line.done(f"ready after {time.monotonic() - start:.0f} s")
            typer.echo(_welcome(settings, base, f"http://{host}:{port}"))
            try:
                while True:
                    signal.pause()
            finally:
                line.say("stopping router, engine and Ray")
    except KeyboardInterrupt:
        typer.echo("stopped")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stops once; a second Ctrl-C must not stop the clearing up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _check_port(host: str, port: int) -> None:
    from act_serve.errors import NotReadyError

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise NotReadyError(
                f"cannot listen on {host}:{port}: {exc.strerror}; stop what is using it or choose another --port"
            ) from exc


def _split(text: str) -> tuple[str, str]:
    from act_serve.errors import ProfileError

    key, equals, value = text.partition("=")
    if not equals:
        raise ProfileError(f"--set {text}: write KEY=VALUE, for example --set max_model_len=4096")
    return key.strip(), value


def _welcome(settings: ServerSettings, base: str, url: str) -> str:
    from act_serve.abilities.catalogue import Catalogue
    from act_serve.abilities.location import shown as shown_place
    from act_serve.abilities.store import open_store

    entries = Catalogue(open_store(settings.store)).refresh().entries.values()
    shown = [f"  {e.name}@{e.active.version}  {e.active.manifest.description}" for e in entries if e.active.manifest]
    message = {"role": "user", "content": "Translate to French: The cat sleeps."}
    body: dict[str, object] = {"messages": [message], "max_tokens": 60}  # an ability of any other kind may ramble
    some = next((e.name for e in entries if e.active.manifest), None)
    if some is not None:
        body["abilities"] = ["fr" if any(e.name == "fr" for e in entries) else some]
    key = ' -H "x-api-key: $KEY"' if settings.keys else ""
    post = f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"
    listed = "\n".join(shown) or f"  none yet in {shown_place(settings.store)}"
    tries = f"try\n  curl {url}/v1/abilities{key}\n  {post}"
    return f"\n{url}  serves {base}\nabilities\n{listed}\n\n{tries}\n\nCtrl-C stops it."
