"""The commands that change a store, or a server over HTTP, do the same to both."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from act_serve.abilities.catalogue import Catalogue, summary
from act_serve.abilities.store import Store
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities_for_tests import publish_random
from tests.server.fake_engine import serving


def run(*words: str, key: str = "secret") -> subprocess.CompletedProcess[str]:
    program = "import sys; from act_serve.cli.main import main; sys.argv[0] = 'act-serve'; main()"
    command = [sys.executable, "-c", program, "ability", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACT_SERVE_KEY": key})


@pytest.fixture(params=["store", "server"])
def target(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Iterator[list[str]]:
    """The options that name what is changed; its store is ``tmp_path/store``."""
    root = tmp_path / "store"
    if request.param == "store":
        yield ["--store", str(root)]
        return
    keys = tmp_path / "keys.json"
    keys.write_text(
        json.dumps([{"id": "a", "sha256": hashlib.sha256(b"secret").hexdigest(), "roles": ["admin"]}])
    )  # JSON is YAML
    settings = ServerSettings(model=tiny_llama, store=root, keys=keys, catalogue_refresh_s=0.05)
    replica = Replica("r", "http://127.0.0.1:9", {})
    with serving(build_app(settings, "base", lambda: FixedUpstream(replica))) as url:
        yield ["--url", url]


def test_the_commands_change_a_store_and_a_server_alike(target: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    shelf = Store(tmp_path / "shelf")
    folders = [publish_random(shelf, tiny_llama, "fr", seed=n, version=n) for n in (1, 2)]

    def say(*words: str) -> str:
        done = run(*words, *target)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert say("add", str(folders[0])) == "added fr@1; active is 1"
    assert say("activate", "fr", "1") == "active is fr@1"
    assert say("add", str(folders[1])) == "added fr@2; active is 1"
    assert say("pin", "fr") == "fr is pinned"
    assert "fr" in say("list")
    if "--url" in target:
        without_key = run("list", *target, key="")
        assert (without_key.returncode, without_key.stderr.count("\n")) == (1, 1)
        assert "--key" in without_key.stderr
    shown = summary(Catalogue(Store(tmp_path / "store")).refresh().ability("fr"))
    assert (shown["version"], shown["versions"], shown["pinned"]) == (1, [1, 2], True)
    refused = run("add", str(folders[1]), *target)
    assert (refused.returncode, "publish a new version" in refused.stderr) == (2, True), refused.stderr
    assert say("pin", "fr", "--off") == "fr is not pinned"
    assert say("remove", "fr", "--version", "2") == "removed fr@2"
    assert say("remove", "fr") == "removed fr@1"
    gone = run("remove", "fr", *target)
    assert (gone.returncode, "no ability 'fr'" in gone.stderr) == (2, True)
    assert len(gone.stderr.splitlines()) == 1


def test_files_go_at_once_if_told_so(tiny_llama: Path, tmp_path: Path) -> None:
    publish_random(Store(tmp_path), tiny_llama, "fr", seed=1)
    assert run("remove", "fr", "--now", "--store", str(tmp_path)).returncode == 0
    assert Store(tmp_path).names() == []


def test_errors_are_one_line_and_name_what_is_wrong(tmp_path: Path) -> None:
    for words, message in (
        (["add", str(tmp_path / "none")], "no such folder"),
        (["add", str(tmp_path), "--store", str(tmp_path / "s")], "cannot be read"),
        (["activate", "fr", "1", "--store", str(tmp_path)], "no ability 'fr'"),
        (["pin", "fr", "--url", "http://127.0.0.1:9"], "is it the address of an act-serve server"),
        (["pin", "fr", "--url", "nonsense"], "is it the address of an act-serve server"),
    ):
        done = run(*words)
        assert done.returncode != 0
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
