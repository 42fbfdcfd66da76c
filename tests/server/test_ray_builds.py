"""Builds on a real local Ray: one is killed and goes on, one is wrong, and neither stops the others."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from act_serve.cli.main import app
from act_serve.delta.artifact import read_artifact
from act_serve.errors import BuildError, EngineError, ProfileError
from act_serve.profile.load import load_profile
from act_serve.profile.schema import Profile
from act_serve.server import ray_builds
from act_serve.server.ray_build_task import LOG, Outcome, _require_shared
from act_serve.server.ray_builds import Progress, build_on_ray
from tests.tiny_models import make_llama, plant


def profile_file(folder: Path, name: str, **changes: Any) -> Path:
    lines = [json.dumps({"prompt": f"say {letter}", "answer": letter * 12}) for letter in "abcde"]
    (folder / "data.jsonl").write_text("\n".join(lines))
    data = {"train": "data.jsonl", "test": "data.jsonl"}
    content = {
        "name": name,
        "description": "A demonstration.",
        "license": "Apache-2.0",
        "base": str(folder / "base"),
        "source": {"model": str(folder / "source")},
        "data": data,
        "localize": {"p": 0.125, "calibration_items": 5},
        "finetune": {"steps": 2, "batch_size": 2, "items": 5},
        "score": [{"name": "demo_nll", "metric": "nll", "items": 5, "data": data}],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    base = make_llama(tmp_path / "base")
    plant(base, tmp_path / "source", p=0.125, scale=0.3)
    return tmp_path


@pytest.mark.slow
def test_killed_build_goes_on_and_a_wrong_one_stops_nobody(pair: Path) -> None:
    long = {"steps": 400, "batch_size": 2, "items": 5}
    missing = {"train": "nowhere.jsonl", "test": "nowhere.jsonl"}
    profiles = [
        load_profile(profile_file(pair, "killed", finetune=long)),
        load_profile(profile_file(pair, "wrong", data=missing)),
        load_profile(profile_file(pair, "quiet")),
    ]
    killed: list[int] = []
    attempts: set[int] = set()

    def show(builds: Mapping[str, Progress]) -> None:
        progress = builds["killed"]
        attempts.add(progress.attempt)
        if not killed and progress.stage.startswith("finetune "):
            killed.append(progress.pid)
            os.kill(progress.pid, signal.SIGKILL)

    found = build_on_ray(profiles, store=pair / "store", work=pair / "work", address="local", show=show)
    by_name = {outcome.name: outcome for outcome in found}
    assert [outcome.name for outcome in found] == ["killed", "wrong", "quiet"]
    assert killed
    assert by_name["killed"] == Outcome("killed", pair / "store" / "killed" / "1", attempts=2)
    assert by_name["quiet"] == Outcome("quiet", pair / "store" / "quiet" / "1")
    assert by_name["wrong"].exit_code == 2
    assert "nowhere.jsonl" in by_name["wrong"].message
    assert {1, 2} <= attempts
    assert read_artifact(pair / "store" / "killed" / "1")[0].localization.fine_tune_steps == 400
    log = (pair / "work" / "killed" / LOG).read_text()
    kept = {line.split()[1] for line in log.splitlines() if "kept from an earlier run" in line}
    assert kept >= {"calibrate", "localize", "transfer"}
    assert not list(pair.glob("*/.shared-*"))


@pytest.mark.slow
def test_command_says_the_worst(pair: Path) -> None:
    profile_file(pair, "good")
    profile_file(pair, "mismatched", source={"model": str(make_llama(pair / "wide", hidden=64))})
    arguments = ["build-delta", str(pair / "good.yaml"), str(pair / "mismatched.yaml"), "--ray-address", "local"]
    result = CliRunner().invoke(app, [*arguments, "--store", str(pair / "store"), "--work", str(pair / "work")])
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert "✓ good: published in" in said
    assert "✗ mismatched: base and ability model differ in hidden_size" in said
    assert "good: starts" in said


def test_worker_without_the_shared_folders(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"does not see .*nowhere .*ACT_SERVE_HOME"):
        _require_shared([tmp_path / "nowhere" / ".shared-1"])


def test_same_ability_twice(pair: Path) -> None:
    profile: Profile = load_profile(profile_file(pair, "twin"))
    with pytest.raises(ProfileError, match="same ability"):
        build_on_ray([profile, profile], store=pair, work=pair, address="local", show=lambda _: None)


def test_what_needs_another_build_is_not_begun_with_it(pair: Path) -> None:
    first, second = (load_profile(profile_file(pair, name)) for name in ("first", "second"))
    finetune = second.finetune.model_copy(update={"company": ("first*0.5", "other@2")})
    waiting = second.model_copy(update={"finetune": finetune})
    with pytest.raises(ProfileError, match=r"second goes on from, or in company of, first, .* such as first@1"):
        build_on_ray([first, waiting], store=pair, work=pair, address="127.0.0.1:1", show=lambda _: None)
    known = waiting.model_copy(update={"finetune": finetune.model_copy(update={"company": ("first@1", "other")})})
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:1 "):  # comes as far as the cluster
        build_on_ray([first, known], store=pair, work=pair, address="127.0.0.1:1", show=lambda _: None)


def test_shipped_profiles_wait_for_nothing_that_is_built_elsewhere() -> None:
    paths = sorted((Path(__file__).parents[2] / "profiles" / "abilities").glob("*.yaml"))
    assert paths
    for path in paths:
        profile = load_profile(path)
        ray_builds._refuse_waiting(profile, [profile.name, "another"])
    es = load_profile(paths[0].with_name("es-2.yaml"))
    with pytest.raises(ProfileError, match="in company of, es, which is built at the same time"):
        ray_builds._refuse_waiting(es.model_copy(update={"name": "castellano"}), ["castellano", "es"])


@pytest.mark.parametrize(
    ("machines", "builds", "room"),
    [
        ([{"CPU": 8.0}], 2, {"num_cpus": 4}),
        ([{"CPU": 2.0}], 5, {"num_cpus": 1}),
        ([{"CPU": 4.0}, {"CPU": 16.0}], 1, {"num_cpus": 16}),  # no build spans machines
        ([{"CPU": 16.0, "GPU": 2.0}], 8, {"num_cpus": 8, "num_gpus": 1}),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0}], 2, {"num_cpus": 12, "num_gpus": 1}),
    ],
)
def test_each_build_has_a_gpu_or_its_share_of_the_cpus(
    machines: list[dict[str, float]], builds: int, room: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    alive = [{"Alive": True, "Resources": machine} for machine in machines]
    monkeypatch.setattr(ray_builds.ray, "nodes", lambda: [dead, *alive])
    assert ray_builds._room(builds) == room


def test_no_cluster_at_the_address(pair: Path) -> None:
    profile = load_profile(profile_file(pair, "lonely"))
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:1 "):
        build_on_ray([profile], store=pair, work=pair, address="127.0.0.1:1", show=lambda _: None)
