from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from act_serve.cli.main import app
from act_serve.errors import (
    ActServeError,
    ArtifactDamagedError,
    BaseMismatchError,
    BuildError,
    DataError,
    EngineError,
    GainError,
    ProfileError,
    RequestError,
    RetentionError,
    StoreError,
)
from act_serve.server.keys import Key, Keys
from tests.abilities.manifests import publish

COMMAND = [sys.executable, "-c", "from act_serve.cli.main import main; main()"]
HEAVY = {"torch", "transformers", "vllm", "ray", "fastapi", "aiohttp", "numpy"}
_LOADED = f"""
import sys
from act_serve.cli.main import main
try:
    main()
finally:
    print("heavy:", sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True)


def test_the_commands() -> None:
    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert names == {
        "serve",
        "build-delta",
        "analyze",
        "eval",
        "export",
        "merge",
        "import",
        "inspect",
        "top",
        "ability",
        "key",
    }


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["serve"],
        ["build-delta"],
        ["eval"],
        ["export"],
        ["merge"],
        ["import"],
        ["inspect"],
        ["top"],
        ["ability"],
        ["ability", "list"],
        ["key", "new"],
    ],
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED, *words, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert "heavy: []" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["serve", "--set", "nonsense=1"], 2, "server setting 'nonsense'"),
        (["serve", "--set", "nonsense"], 2, "write KEY=VALUE"),
        (["serve", "--default-abilities", "a b"], 2, "none, auto or a composition"),
        (["serve", "--model", "no-such-folder"], 2, "has no config.json"),
        (["serve", "--keys", "no-such-file"], 2, "the keys file cannot be read"),
        (["key", "new", "--role", "root"], 2, "entry 1, roles"),
        (["inspect", "no-such-folder"], 5, "cannot be read"),
        (["ability", "list", "--url", "http://127.0.0.1:9"], 1, "does not list abilities"),
    ],
)
def test_users_mistakes_are_one_line_and_an_exit_code(words: list[str], code: int, message: str) -> None:
    done = run(*words)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.startswith("act-serve: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [(EngineError, 1), (StoreError, 1), (ProfileError, 2), (DataError, 2), (RequestError, 2), (BuildError, 3),
     (RetentionError, 4), (GainError, 4), (ArtifactDamagedError, 5), (BaseMismatchError, 5)],
)  # fmt: skip
def test_the_documented_exit_codes(error: type[ActServeError], code: int) -> None:
    assert error.exit_code == code
    assert f"| {code} |" in (Path(__file__).parents[2] / "docs" / "operating.md").read_text()


@pytest.mark.parametrize(
    ("typed", "offered"), [("act-serve ab", {"ability"}), ("act-serve ability a", {"add", "activate"})]
)
def test_the_shell_completes_commands(typed: str, offered: set[str]) -> None:
    code = "import sys; sys.argv[0] = 'act-serve'; from act_serve.cli.main import main; main()"
    words = {"_ACT_SERVE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **words})
    assert set(done.stdout.split()) == offered


def test_a_busy_port_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port))
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_new_key_is_said_once_and_its_line_makes_a_keys_file(tmp_path: Path) -> None:
    done = run("key", "new", "--role", "infer", "--id", "shop", "--abilities", "fr,extract", "--burst", "2",
               "--requests-per-minute", "30")  # fmt: skip
    secret = done.stderr.split()[-1]
    file = tmp_path / "keys.yaml"
    file.write_text(done.stdout)
    assert secret not in done.stdout
    keys = Keys(file)
    assert keys.check({"authorization": f"Bearer {secret}"}, "infer") == Key(
        "shop", frozenset({"infer"}), frozenset({"fr", "extract"})
    )
    assert not keys.has_admin
    assert run("key", "new", "--role", "infer").stderr.split()[-1] != secret


def test_abilities_of_a_store(tmp_path: Path) -> None:
    publish(tmp_path, "fr", kind="language", languages=("fr",))
    done = run("ability", "list", "--store", str(tmp_path), "--json")
    assert [(row["name"], row["languages"]) for row in json.loads(done.stdout)] == [("fr", ["fr"])]
    assert "the ability fr" in run("ability", "list", "--store", str(tmp_path)).stdout
    assert "no abilities in" in run("ability", "list", "--store", str(tmp_path / "none")).stdout


@pytest.mark.parametrize(
    ("command", "module", "extra"), [("inspect abilities/fr/1", "torch", "build"), ("serve", "ray", "serve")]
)
def test_a_missing_extra_is_one_line_that_says_what_to_install(command: str, module: str, extra: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; sys.argv = ['act-serve', *{command.split()!r}]\n"
    code += "from act_serve.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith(f"act-serve: {module} is not installed; run: pip install 'act-serve[{extra}]'\n")
    assert "Traceback" not in done.stderr
