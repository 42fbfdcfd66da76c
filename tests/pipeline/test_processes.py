"""A build by several processes, as `accelerate launch` starts them: one ability, its rows trained by all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from act_serve.abilities.store import Store
from act_serve.delta.artifact import ModuleDelta, read_artifact
from tests.pipeline.test_run import P, profile_file
from tests.tiny_models import make_llama, plant

pytestmark = pytest.mark.slow

ACT_SERVE = Path(sys.executable).with_name("act-serve")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plant(make_llama(tmp_path / "base"), tmp_path / "source", p=P, scale=0.3)
    return tmp_path


def build(folder: Path, name: str, accumulated: int, *launcher: str) -> subprocess.CompletedProcess[str]:
    path = profile_file(folder)
    content = yaml.safe_load(path.read_text())
    content["name"] = name
    content["finetune"] |= {"steps": 4, "gradient_accumulation": accumulated}
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, *launcher, str(ACT_SERVE), "build-delta", str(path), "--threads", "1"]
    command += ["--store", str(folder / "store"), "--work", str(folder / "work")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def deltas(folder: Path, name: str) -> dict[str, ModuleDelta]:
    assert Store(folder / "store").versions(name) == [1]
    return read_artifact(folder / "store" / name / "1")[1]


def distance(left: dict[str, ModuleDelta], right: dict[str, ModuleDelta]) -> float:
    return sum(float((left[name].delta.float() - right[name].delta.float()).square().sum()) for name in left) ** 0.5


def test_two_processes_build_what_one_builds_with_twice_the_batches(folder: Path) -> None:
    for name, accumulated, launcher in (("alone", 2, []), ("together", 1, LAUNCHER), ("less", 1, [])):
        done = build(folder, name, accumulated, *launcher)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert done.stdout.count("✓ finetune") == 1, "the others say nothing"
    alone, together, less = (deltas(folder, name) for name in ("alone", "together", "less"))
    assert alone.keys() == together.keys()
    # Gradients are summed in another order, and rows are kept in bfloat16.
    assert distance(alone, together) < 0.1 * distance(alone, less)


def test_an_error_ends_all_processes(folder: Path) -> None:
    (folder / "source" / "model.safetensors").write_bytes(b"damaged")
    done = build(folder, "broken", 1, *LAUNCHER)
    assert done.returncode != 0
    assert "can't be loaded" in done.stderr or str(folder / "source") in done.stderr
    assert not (folder / "store" / "broken").exists()


def test_they_build_one_profile_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("COLUMNS", "300")
    path = str(profile_file(folder))
    for more in ([path], ["--ray"]):
        done = subprocess.run([str(ACT_SERVE), "build-delta", path, *more], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "one profile at a time" in done.stderr
