"""The benchmarks of abilities, whole, on a tiny pair: figures are what they say, and nothing is measured twice."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from act_serve.abilities.store import Store
from act_serve.models.examples import Example
from act_serve.models.families import channel_modules
from act_serve.pipeline.finetune import Lessons
from act_serve.pipeline.measured import Measured
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.run import build
from act_serve.profile.load import load_profile
from act_serve.profile.schema import FineTune, Retention
from benchmarks import ability_peers, ability_quality
from benchmarks.ability_bench import fallen, gain_kept
from benchmarks.peft_peers import BYTES_PER_VALUE, Peer, fitting_rank, train_peer
from tests.tiny_models import make_llama, plant


def profile(folder: Path, name: str, letters: str) -> Path:
    """An ability that says letters, with an ability model of its own."""
    lines = [json.dumps({"prompt": f"say {letter}", "answer": letter * 12}) for letter in letters]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    plant(folder / "base", folder / f"{name}-source", p=0.1, scale=0.3, seed=len(name))
    data = {"train": f"../{name}.jsonl", "test": f"../{name}.jsonl"}
    content: dict[str, Any] = {
        "name": name,
        "description": "A demonstration.",
        "license": "Apache-2.0",
        "base": str(folder / "base"),
        "source": {"model": str(folder / f"{name}-source")},
        "data": data,
        "localize": {"ranking": "weight_relative", "p": 0.1, "calibration_items": 5},
        "finetune": {"steps": 2, "batch_size": 2, "items": 5, "retention": {"items_per_step": 1}},
        "score": [{"name": f"{name}_nll", "metric": "nll", "items": 5, "data": data}],
        "retain": [{"name": "other", "metric": "nll", "items": 5, "max_drop": 1.0, "data": data}],
    }
    path = folder / "profiles" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_llama(tmp_path / "base")
    for name, letters in (("demo", "abcde"), ("second", "vwxyz")):
        path, screen = profile(tmp_path, name, letters), Screen(Console(file=io.StringIO()))
        build(load_profile(path), store=Store(tmp_path / "store"), work=tmp_path / "work" / name, screen=screen)
    return tmp_path


def common(home: Path) -> list[str]:
    return [*("--store", str(home / "store")), *("--profiles", str(home / "profiles")), *("--work", str(home / "work"))]


def test_quality_is_measured_once_and_agrees_with_the_build(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*common(home), "--json", str(home / "q.json"), "--only"]
    ability_quality.main([*arguments, "quality"])
    assert "measuring demo on the base" in capsys.readouterr().out
    found = json.loads((home / "q.json").read_text())["quality"]["figures"]["demo"]
    manifest = Store(home / "store").manifest("demo", 1)
    own, stored = found["tasks"][0], manifest.scores[0]
    assert found["source_at_hand"]
    for variant in ("base", "source", "delta"):
        assert own[variant]["score"] == pytest.approx(getattr(stored, variant), abs=1e-4)
        assert own[variant]["low"] <= own[variant]["score"] <= own[variant]["high"]
    assert stored.source is not None
    if stored.source < stored.base:
        share = (stored.delta - stored.base) / (stored.source - stored.base)
        assert own["share_kept"]["value"] == pytest.approx(share, abs=1e-2)
    else:
        assert own["share_kept"] is None
    assert own["transfer"]["score"] == stored.transfer
    evaluation = json.loads((home / "store" / "demo" / "1" / "evaluation.json").read_text())
    assert evaluation["intervals"]["delta"]["demo_nll"] == pytest.approx(
        [own["delta"]["low"], own["delta"]["high"]], abs=1e-4
    )
    ability_quality.main([*arguments, "quality,pairs,repair"])
    said = capsys.readouterr().out
    assert "measuring demo on the base" not in said
    assert "measuring demo+second on the base" in said
    report = json.loads((home / "q.json").read_text())
    assert report.keys() == {"quality", "pairs", "repair"}
    assert report["pairs"]["figures"]["demo+second"]["abilities"].keys() == {"demo", "second"}
    ability_quality.main([*common(home), "--json", str(home / "other.json"), "--only", "quality", "--seed", "1"])
    drawn = json.loads((home / "other.json").read_text())["quality"]
    assert drawn["seed"] == 1
    assert "transfer" not in drawn["figures"]["demo"]["tasks"][0], "a stored figure is not of these examples"


def test_methods_are_compared_at_equal_bytes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*common(home), "--ability", "demo", "--steps", "2", "--json", str(home / "p.json")]
    ability_peers.main(arguments)
    found = json.loads((home / "p.json").read_text())["methods"]
    assert found.keys() == {"base", "source", *ability_peers.METHODS}
    rows = found["rows"]
    assert rows["tasks"]["demo_nll"]["minus_rows"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    scores = {name: method["tasks"]["demo_nll"]["score"] for name, method in found.items()}
    assert len(set(scores.values())) == len(scores)  # every method changed the model in its own way
    capsys.readouterr()
    ability_peers.main(arguments)
    assert " took " not in capsys.readouterr().out


def test_merges_stand_beside_the_composed_sum(home: Path) -> None:
    ability_peers.main([*common(home), "--merge", "demo+second", "--json", str(home / "m.json")])
    found = json.loads((home / "m.json").read_text())["methods"]
    ability_quality.main([*common(home), "--json", str(home / "q.json"), "--only", "pairs"])
    pair = json.loads((home / "q.json").read_text())["pairs"]["figures"]["demo+second"]["abilities"]["demo"][0]
    assert found["sum"]["tasks"]["demo_nll"]["score"] == pytest.approx(pair["together"]["score"], abs=0.02)
    assert found["ties"]["tasks"]["demo_nll"]["score"] != found["sum"]["tasks"]["demo_nll"]["score"]


@pytest.mark.parametrize("method", ["lora", "lora_svd", "shira"])
def test_a_peer_has_the_bytes_it_is_given(tmp_path: Path, method: str) -> None:
    base = make_llama(tmp_path / "base")
    plant(base, tmp_path / "source", p=0.1, scale=0.3)
    modules = channel_modules(base)
    per_rank = BYTES_PER_VALUE[method] * sum(each.in_features + each.out_features for each in modules)
    peer = Peer(method, round(2.4 * per_rank), base, tmp_path / "source")
    assert fitting_rank(peer, modules) == 2
    settings = FineTune(steps=2, batch_size=1, items=2, retention=Retention(items_per_step=1))
    lessons = Lessons([Example("say a", "aaaa"), Example("say b", "bbbb")], [Example("say c", "cccc")])
    _, size, parameters = train_peer(peer, lessons, [], settings, 0, None, lambda *_: None)
    assert size == 2 * per_rank
    assert parameters * BYTES_PER_VALUE[method] == size


def nll(values: list[float]) -> Measured:
    return Measured("nll", [[value, 1.0] for value in values])


def test_shares_and_falls_know_the_direction() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(200, generator=draw)).tolist()
    base, source, delta = (nll([level + value for value in noise]) for level in (3.0, 1.0, 1.2))
    share = gain_kept(base, source, delta)
    assert share is not None
    assert share["value"] == pytest.approx(0.9, abs=1e-3)
    assert gain_kept(source, base, delta) is None  # what "gained" was a loss
    worse = fallen(source, delta)
    assert worse is not None
    assert worse["value"] == pytest.approx(0.2, abs=0.01)
    assert worse["low"] > 0
