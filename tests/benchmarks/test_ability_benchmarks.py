"""The benchmarks of abilities, whole, on a tiny pair: figures are what they say, and nothing is measured twice."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from act_serve.abilities.desired_state import AbilityState, DesiredState, write_state
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
from benchmarks.ability_controls import at_most
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
    assert found["source"] == "as built"
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


def section(home: Path, name: str, *more: str) -> Any:
    """The figures of one section, measured now."""
    ability_quality.main([*common(home), "--json", str(home / "q.json"), "--only", name, *more])
    return json.loads((home / "q.json").read_text())[name]["figures"]


def test_the_active_and_the_latest_version_are_measured(home: Path) -> None:
    path, store = home / "profiles" / "demo.yaml", Store(home / "store")
    content = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "localize"}
    other = path.with_name("demo-2.yaml")
    other.write_text(yaml.safe_dump({**content, "source": {"ability": "demo"}}))
    build(load_profile(other), store=store, work=home / "work" / "demo-2", screen=Screen(Console(file=io.StringIO())))
    assert section(home, "quality").keys() == {"demo", "second"}
    write_state(store.root, DesiredState().having("demo", AbilityState(active=1)))
    found = section(home, "quality")
    assert found.keys() == {"demo@1", "demo@2", "second"}
    for version in (1, 2):
        (stored,) = (score for score in store.manifest("demo", version).scores if score.task == "demo_nll")
        figures = found[f"demo@{version}"]
        assert figures["version"] == version
        assert figures["tasks"][0]["delta"]["score"] == pytest.approx(stored.delta, abs=1e-4)
        assert figures["tasks"][0]["transfer"]["score"] == stored.transfer
    assert section(home, "pairs").keys() == {"demo@1+second", "demo@2+second"}
    composition = "demo@2*0.5+second"
    abilities = section(home, "triples", "--triples", composition)[composition]["abilities"]
    assert abilities.keys() == {"demo@2", "second"}
    (task,) = abilities["demo@2"]
    assert task["alone"] == found["demo@2"]["tasks"][0]["delta"]
    assert task["together"]["score"] != task["alone"]["score"]
    with pytest.raises(SystemExit, match="no ability with a profile is called nobody"):
        section(home, "triples", "--triples", "demo+nobody")


def test_other_source_models_are_named_and_used_only_if_accepted(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(home / "base", home / "demo-source", p=0.1, scale=0.3, seed=99)
    shutil.rmtree(home / "second-source")
    found = section(home, "quality")
    said = capsys.readouterr().out
    assert "source models of second are not at hand" in said
    assert "source models of demo are other ones than the abilities were built from: not used" in said
    assert {ability["source"] for ability in found.values()} == {"not at hand"}
    assert "low" not in found["demo"]["tasks"][0]["source"], "the stored figure"
    assert section(home, "repair") == {}
    assert "repair is empty: no source model is at hand" in capsys.readouterr().out
    found = section(home, "quality", "--rebuilt-sources")
    assert "demo 0.0 MB p=0.1 (source: rebuilt)" in capsys.readouterr().out
    assert found["demo"]["source"] == "rebuilt"
    assert "low" in found["demo"]["tasks"][0]["source"]


def test_controls_are_the_transfer_in_other_rows(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = section(home, "controls")
    demo = found["rows"]["demo"]
    own, retained = demo["tasks"]
    assert own["rows_of"].keys() == retained["rows_of"].keys() == {"own", "random 0", "random 1", "random 2", "second"}
    (stored,) = (score for score in Store(home / "store").manifest("demo").scores if score.task == "demo_nll")
    assert own["rows_of"]["own"]["score"] == pytest.approx(stored.transfer, abs=1e-4)
    assert own["rows_of"]["own"]["minus_own"]["value"] == 0
    drawn = [own["rows_of"][f"random {seed}"]["score"] for seed in range(3)]
    assert len(set(drawn)) == 3
    assert own["random_mean"] == pytest.approx(sum(drawn) / 3, abs=1e-4)
    assert max(demo["parameters"].values()) < 1.05 * min(demo["parameters"].values())
    assert retained["rows_of"]["own"]["share_kept"] is None
    assert found["halved"]["demo+second"].keys() == {"demo", "second"}
    (halved,) = found["halved"]["demo+second"]["demo"]
    assert halved["source"] == own["source"]
    assert halved["halved"]["score"] not in (halved["source"]["score"], halved["base"]["score"])
    assert "in second rows" in capsys.readouterr().out
    assert section(home, "controls") == found
    assert "measuring" not in capsys.readouterr().out


def test_a_mask_lends_no_more_than_it_is_asked_for() -> None:
    rows, widths = {"left": torch.arange(10), "right": torch.arange(6)}, {"left": 4, "right": 8}
    assert {name: part.tolist() for name, part in at_most(1000, rows, widths).items()} == {
        name: part.tolist() for name, part in rows.items()
    }
    lent = at_most(40, rows, widths)
    assert 40 - 8 < sum(widths[name] * len(part) for name, part in lent.items()) <= 40
    assert all(part.tolist() == sorted(set(part.tolist())) for part in lent.values())


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


def test_methods_are_measured_beside_another_ability_and_with_other_finetuning(home: Path) -> None:
    arguments = [*common(home), "--ability", "demo", "--steps", "2", "--methods", "rows,lora,shira"]
    ability_peers.main(
        [*arguments, "--finetune", "{learning_rate: 0.05}", "--beside", "second", "--json", str(home / "b.json")]
    )
    beside = json.loads((home / "b.json").read_text())["methods"]
    ability_peers.main(
        [*arguments, "--finetune", "{retention: null, learning_rate: 0.05}", "--json", str(home / "f.json")]
    )
    forgetting = json.loads((home / "f.json").read_text())["methods"]
    ability_quality.main([*common(home), "--json", str(home / "q.json"), "--only", "quality"])
    second = json.loads((home / "q.json").read_text())["quality"]["figures"]["second"]["tasks"][0]["delta"]["score"]
    assert beside["base"]["tasks"]["second_nll_with_second"]["score"] == pytest.approx(second, abs=1e-4)
    for method in ("rows", "lora", "shira"):
        tasks = beside[method]["tasks"]
        assert tasks["demo_nll_with_second"]["score"] != tasks["demo_nll"]["score"]
        assert tasks["second_nll_with_second"]["score"] != beside["base"]["tasks"]["second_nll_with_second"]["score"]
        assert forgetting[method]["tasks"]["demo_nll"]["score"] != tasks["demo_nll"]["score"]
    with pytest.raises(SystemExit, match="give second no weight"):
        ability_peers.main([*arguments, "--beside", "second*0.5", "--json", str(home / "b.json")])


def test_rankings_are_methods_and_rows_need_no_training(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*common(home), "--ability", "demo", "--steps", "0", "--json", str(home / "p.json")]
    ability_peers.main([*arguments, "--methods", "rows,weight_relative,gradient,random_rows"])
    found = json.loads((home / "p.json").read_text())["methods"]
    parameters = [found[name]["parameters"] for name in ("rows", "gradient", "random_rows")]
    assert max(parameters) - min(parameters) < 0.02 * max(parameters)
    scores = {name: method["tasks"]["demo_nll"]["score"] for name, method in found.items()}
    assert scores["rows"] == scores["weight_relative"], "the profile's own ranking by its name"
    assert len({scores[name] for name in ("base", "source", "rows", "random_rows")}) == 4
    with pytest.raises(SystemExit, match="lora must be trained"):
        ability_peers.main([*arguments, "--methods", "rows,lora"])
    with pytest.raises(SystemExit):
        ability_peers.main([*arguments, "--methods", "gradients"])
    assert "no method 'gradients'" in capsys.readouterr().err


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
