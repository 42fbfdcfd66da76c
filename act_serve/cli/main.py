"""The ``act-serve`` command: one file per sub-command, and nothing heavy imported before one runs."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from act_serve import __version__
from act_serve.cli.ability import ability
from act_serve.cli.analyze import analyze
from act_serve.cli.build_delta import build_delta
from act_serve.cli.change_ability import activate_ability, add_ability, pin_ability, remove_ability
from act_serve.cli.evaluate import evaluate
from act_serve.cli.export import export
from act_serve.cli.import_ability import import_ability
from act_serve.cli.inspect import inspect
from act_serve.cli.key import key
from act_serve.cli.merge import merge
from act_serve.cli.serve import serve
from act_serve.cli.show_ability import show_ability
from act_serve.cli.top import top
from act_serve.errors import ActServeError, MissingExtraError

# What each extra of the package brings, for the message when it is missing.
EXTRAS = {
    "build": (
        "accelerate",
        "gguf",
        "jinja2",
        "lingua",
        "matplotlib",
        "sacrebleu",
        "safetensors",
        "torch",
        "transformers",
    ),
    "otel": ("opentelemetry",),
    "s3": ("s3fs",),
    "serve": (
        "aiohttp",
        "fastapi",
        "httpx",
        "prometheus_client",
        "psutil",
        "py3langid",
        "python_multipart",
        "ray",
        "uvicorn",
        "vllm",
    ),
}

app = typer.Typer(
    name="act-serve",
    help="One language model and many abilities, chosen and composed for every single request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve)
app.command("build-delta")(build_delta)
app.command("analyze")(analyze)
app.command("eval")(evaluate)
app.command("export")(export)
app.command("merge")(merge)
app.command("import")(import_ability)
app.command("inspect")(inspect)
app.command("top")(top)
ability.command("show")(show_ability)
ability.command("add")(add_ability)
ability.command("remove")(remove_ability)
ability.command("activate")(activate_ability)
ability.command("pin")(pin_ability)
app.add_typer(ability, name="ability")
app.add_typer(key, name="key")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"act-serve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None: ...


def main() -> None:
    """Runs the command line; errors made for users are one line on stderr and their own exit code."""
    try:
        app()
    except ActServeError as exc:
        _fail(exc)
    except ModuleNotFoundError as exc:
        module = (exc.name or "").partition(".")[0]
        extra = next((name for name, modules in EXTRAS.items() if module in modules), None)
        if extra is None:
            raise
        _fail(MissingExtraError(module, extra))
    except (MemoryError, RuntimeError) as exc:
        if not _out_of_memory(exc):
            raise
        _fail(ActServeError(f"out of memory ({exc}); end what else uses it, or take a smaller model"))


def _out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from act_serve.models.free_memory import out_of_memory

    return out_of_memory(error)


def _fail(error: ActServeError) -> NoReturn:
    print(f"act-serve: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
