"""Stores on S3, as moto's server speaks it over HTTP."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from typer.testing import CliRunner

from act_serve.abilities.catalogue import Catalogue
from act_serve.abilities.changes import activate
from act_serve.abilities.store import Store
from act_serve.cli.main import app as command_line
from act_serve.delta.artifact import read_artifact
from act_serve.delta.composition import Composition
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import MANIFEST_FILE, TENSORS_FILE
from act_serve.engine.admission import Admission
from act_serve.errors import ArtifactDamagedError, ExistsError, StoreError
from act_serve.pipeline.publish import channel_counts, publish_deltas
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities.object_stores import BUCKET, MotoServer, ObjectStore, environment, state_of
from tests.abilities_for_tests import publish_random, random_modules
from tests.server.admin_server import ADMIN, CHAT, keys_file, tar
from tests.server.fake_engine import fake_engine, serving

_MAIN = "from act_serve.cli.main import main; main()"


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    server = MotoServer()
    with environment(server.url):
        yield server
    server.stop()


@pytest.fixture
def remote(moto: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    return ObjectStore(f"s3://{BUCKET}/{uuid4().hex}/abilities", tmp_path, monkeypatch)


def publish(store: Store, base: Path, name: str, seed: int = 1) -> Path:
    """As a build publishes."""
    return publish_deltas(
        store=store, deltas=random_modules(base, seed), channels=channel_counts(base), stored="bfloat16",
        files={"evaluation.json": b"{}\n"}, name=name, kind="other", description="random rows", license="Apache-2.0",
        base=base.name, base_fingerprint=fingerprint_model(base),
    )  # fmt: skip


async def test_what_is_built_into_a_bucket_is_admitted_from_it_elsewhere(remote: ObjectStore, tiny_llama: Path) -> None:
    built = remote.machine("builder")
    assert publish(built, tiny_llama, "fr").name == "1"
    assert publish(built, tiny_llama, "fr", seed=2).name == "2"
    there = [MANIFEST_FILE, TENSORS_FILE, "evaluation.json"]
    assert remote.objects() == [f"fr/{version}/{file}" for version in (1, 2) for file in there]
    engine = remote.machine("engine")
    pinned = await Admission(engine, fingerprint_model(tiny_llama)).pin(Composition.parse("fr*0.5"))
    assert str(pinned) == f"fr@2~{built.manifest('fr', 2).digest}*0.5"
    manifest, modules = read_artifact(engine.path("fr", 2))
    assert manifest == built.manifest("fr", 2)
    assert (modules.keys(), (engine.path("fr", 2) / "evaluation.json").read_text()) == (manifest.modules.keys(), "{}\n")
    assert not (engine.path("fr", 1) / TENSORS_FILE).exists()


async def test_damaged_objects_are_refused_and_never_cached(remote: ObjectStore, tiny_llama: Path) -> None:
    publish(remote.machine("builder"), tiny_llama, "fr")
    key = f"fr/1/{TENSORS_FILE}"
    good = remote.get(key)
    remote.put(key, good[:-1] + bytes([good[-1] ^ 1]))
    engine = remote.machine("engine")
    admission = Admission(engine, fingerprint_model(tiny_llama))
    with pytest.raises(ArtifactDamagedError, match="another sha256"):
        await admission.pin(Composition.parse("fr"))
    assert not [path for path in (engine.root / ".blobs").iterdir() if not path.name.endswith(".lock")]
    remote.put(key, good)
    assert (await admission.pin(Composition.parse("fr"))).pinned


def test_two_publishers_of_one_version_do_not_overwrite_each_other(remote: ObjectStore, tiny_llama: Path) -> None:
    one = remote.machine("one")
    publish(one, tiny_llama, "fr")
    assert not one.mirror.remote.create(f"fr/1/{MANIFEST_FILE}", b"mine")  # type: ignore[union-attr]
    with pytest.raises(ExistsError):
        one.mirror.publish(one.fetch("fr", 1), "fr", 1)  # type: ignore[union-attr]


def test_a_bucket_that_does_not_exist_is_no_empty_store(remote: ObjectStore) -> None:
    with pytest.raises(StoreError, match="bucket does not exist"):
        remote.machine(url="s3://no-such-bucket/a").refresh()


def test_a_store_does_not_see_what_lies_beside_its_prefix(remote: ObjectStore, tiny_llama: Path) -> None:
    publish(remote.machine(url=f"{remote.url}-other"), tiny_llama, "math")
    publish(remote.machine(url=remote.url.rpartition("/")[0]), tiny_llama, "math")
    assert remote.machine("two").names() == []


def test_routers_serve_a_bucket_follow_it_and_write_their_changes_to_it(
    remote: ObjectStore, tiny_llama: Path, tmp_path: Path
) -> None:
    shelf = Store(tmp_path / "shelf")
    for version in (1, 2):
        publish_random(shelf, tiny_llama, "fr", version=version, seed=version)
    keys = keys_file(tmp_path, admin={"roles": ["admin", "infer"]})
    settings = ServerSettings(model=tiny_llama, store=remote.url, keys=keys, catalogue_refresh_s=0.1)
    with fake_engine() as engine:
        apps = []
        for machine in ("one", "two"):
            remote.machine(machine)
            apps.append(build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url, {}))))
        with (
            serving(apps[0]) as first,
            serving(apps[1]) as second,
            httpx.Client(base_url=first, timeout=60, headers=ADMIN) as one,
            httpx.Client(base_url=second, timeout=60, headers=ADMIN) as two,
        ):
            for version in (1, 2):
                added = one.post("/v1/abilities", content=tar(shelf.path("fr", version)))
                assert added.status_code == 201, added.text
            assert one.post("/v1/abilities", content=tar(shelf.path("fr", 2))).status_code == 409
            assert one.post("/v1/abilities/fr/activate", json={"version": 1}).status_code == 200
            assert state_of(remote)["fr"]["active"] == 1
            while two.post(CHAT, json={"abilities": ["fr"], "messages": []}).headers.get("x-act-abilities") != "fr@1*1":
                time.sleep(0.05)
            assert two.delete("/v1/abilities/fr/versions/2").json()["removed"] == [2]
            while one.get("/v1/abilities/fr").json()["draining"] != [2]:
                time.sleep(0.05)
            assert "store_stale_s" not in one.get("/ready").json()
    assert list((remote.machine("one").root).glob(".incoming*")) == []


def test_a_router_serves_on_while_its_bucket_is_away_and_says_so(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moto = MotoServer()
    try:
        with environment(moto.url), fake_engine() as engine:
            remote = ObjectStore(f"s3://{BUCKET}/{uuid4().hex}", tmp_path, monkeypatch)
            publish(remote.machine(), tiny_llama, "fr")
            settings = ServerSettings(model=tiny_llama, store=remote.url, catalogue_refresh_s=0.1)
            app = build_app(settings, "base", lambda: FixedUpstream(Replica("r1", engine.url, {})))
            with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
                moto.stop()
                while not (stale := client.get("/v1/abilities").json().get("store_stale_s")):
                    time.sleep(0.1)
                assert stale > 0
                assert client.get("/ready").json()["store_stale_s"] > 0
                assert "act_store_stale_seconds 0.0\n" not in client.get("/metrics").text
                assert [row["name"] for row in client.get("/v1/abilities").json()["data"]] == ["fr"]
                reply = client.post(CHAT, json={"abilities": ["fr"], "messages": []})
                assert reply.headers["x-act-abilities"] == "fr@1*1"
            listed = CliRunner().invoke(command_line, ["ability", "list", "--store", remote.url])
            assert listed.exit_code == 0
            assert "this is what is cached" in listed.output
            assert "serving what is cached" in caplog.text
    finally:
        moto.stop()


def test_the_command_line_lists_and_changes_a_bucket(remote: ObjectStore, tiny_llama: Path) -> None:
    publish(remote.machine("builder"), tiny_llama, "fr")
    publish(remote.machine("builder"), tiny_llama, "fr", seed=2)
    environ = {**os.environ, "ACT_SERVE_HOME": str(remote.homes / "laptop")}

    def run(*words: str) -> str:
        command = [
            sys.executable,
            "-c",
            "from act_serve.cli.main import main; main()",
            "ability",
            *words,
            "--store",
            remote.url,
        ]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "fr" in run("list")
    assert run("activate", "fr", "1") == "active is fr@1\n"
    assert '"version": 1' in run("list", "--json")
    assert run("remove", "fr", "--version", "2", "--now") == "removed fr@2\n"
    assert not [key for key in remote.objects() if key.startswith("fr/2/")]
    folder = Catalogue(remote.machine("builder")).refresh().ability("fr")
    assert [version.version for version in folder.versions] == [1]


def test_keys_in_a_url_open_the_bucket_and_are_logged_nowhere(
    remote: ObjectStore, tiny_llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    secret = hashlib.sha256(b"secret").hexdigest()
    url = remote.url.replace("s3://", f"s3://AKIATEST:{secret}@")
    store = remote.machine(url=url)
    publish(store, tiny_llama, "fr")
    activate(store, "fr", 1)
    lost: Any = remote.machine("two", url.replace(BUCKET, "no-such-bucket"))
    with pytest.raises(StoreError) as raised:
        lost.refresh()
    assert secret not in str(raised.value)
    assert raised.value.__cause__ is None
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("act_serve")]
    assert secret not in "\n".join(ours)
