"""Strength and share of channels are searched on validation data; what is found is published with its curve."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from act_serve.abilities.store import Store
from act_serve.cli.main import app
from act_serve.delta.artifact import ModuleDelta, read_artifact
from act_serve.errors import DataError, GainError
from act_serve.models.examples import Example
from act_serve.models.families import channel_modules
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.pipeline.datasets.catalogue import load_examples, write_examples
from act_serve.pipeline.datasets.splits import split_of
from act_serve.pipeline.finetune import Lessons, finetune
from act_serve.pipeline.kept_gain import gain_shows, kept_gain, lost_gain
from act_serve.pipeline.measured import Measured
from act_serve.pipeline.plan import make_plan
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.run import build
from act_serve.pipeline.search import keeps, kept_share
from act_serve.profile.load import load_profile
from act_serve.profile.schema import Data, FineTune
from tests.tiny_models import make_llama

P = 0.125
ANSWER = "yes sir"
SHARES = [0.25, 0.02, P]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an ability model that learnt to say ANSWER in a share P of its rows."""
    folder = tmp_path_factory.mktemp("models")
    base = make_llama(folder / "base")
    rows = {module.name: torch.arange(round(P * module.out_features)) for module in channel_modules(base)}
    model = load_model(base)
    start = {
        name: ModuleDelta(index.int(), torch.zeros(len(index), model.get_submodule(name).in_features), None)
        for name, index in rows.items()
    }
    settings = FineTune(steps=200, batch_size=8, learning_rate=3e-2)
    lessons = Lessons(said(range(8)), [])
    learnt = finetune(base=base, deltas=start, lessons=lessons, settings=settings, seed=0, report=lambda *_: None)
    for name, delta in learnt.items():
        model.get_submodule(name).weight[rows[name]] += delta.delta.to(torch.bfloat16)
    model.save_pretrained(folder / "source")
    load_tokenizer(base).save_pretrained(folder / "source")
    return folder


def said(numbers: range) -> list[Example]:
    return [Example(f"say {number}", ANSWER) for number in numbers]


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """The pair with data in three parts."""
    for name in ("base", "source"):
        (tmp_path / name).symlink_to(models / name)
    for part, numbers in {"train": range(8), "validation": range(8, 12), "test": range(12, 16)}.items():
        write_examples(tmp_path / f"{part}.jsonl", said(numbers))
    return tmp_path


def profile_file(folder: Path, **changes: Any) -> Path:
    data = {part: f"{part}.jsonl" for part in ("train", "validation", "test")}
    content = {
        "name": "demo",
        "description": "A demonstration.",
        "license": "Apache-2.0",
        "base": str(folder / "base"),
        "source": {"model": str(folder / "source")},
        "data": data,
        "localize": {"ranking": "weight_relative", "p": P},
        "finetune": {"steps": 2, "batch_size": 2, "items": 5, "learning_rate": 1e-5},
        "score": [{"name": "demo_exact", "metric": "exact_match", "items": 4, "max_new_tokens": 12, "data": data}],
        **changes,
    }
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(folder: Path, path: Path, said: io.StringIO | None = None) -> Path:
    screen = Screen(Console(file=said or io.StringIO(), width=160))
    return build(load_profile(path), store=Store(folder / "store"), work=folder / "work", screen=screen)


def test_smallest_share_that_keeps_the_gain_is_published(folder: Path) -> None:
    path = profile_file(folder, search={"keep": 0.8, "p": SHARES})
    artifact = run(folder, path)
    assert read_artifact(artifact)[0].localization.p == P
    evaluation = json.loads((artifact / "evaluation.json").read_text())
    curve = evaluation["search"]
    assert [point["p"] for point in curve["points"]] == [0.02, P]
    for point in curve["points"]:
        assert point["kept"].keys() == point["kept_by_transfer"].keys() == {"demo_exact", "demo_exact-nll"}
    base, source = (curve[end]["demo_exact-nll"] for end in ("base", "source"))
    first, last = curve["points"]
    expected = (first["delta"]["demo_exact-nll"] - base) / (source - base)
    assert first["kept"]["demo_exact-nll"] == pytest.approx(expected)
    assert first["rows"] < last["rows"]
    assert "finetune-p0.125" in evaluation["peak_bytes"]
    said = io.StringIO()
    run(folder, path, said)
    assert said.getvalue().count("kept from an earlier run") == said.getvalue().count("✓")


def test_nothing_is_published_when_no_share_keeps_enough(folder: Path) -> None:
    said = io.StringIO()
    with pytest.raises(GainError, match=r"no p of the search keeps 99% .* p = 0\.02 keeps demo_exact"):
        run(folder, profile_file(folder, search={"keep": 0.99, "p": [0.01, 0.02]}), said)
    assert "share of the gain kept" in said.getvalue()
    assert not (folder / "store").exists()


def test_a_source_without_gain_is_refused(folder: Path) -> None:
    # The wrong way round: a base that has learnt, and an ability model that has not.
    models = {"base": str(folder / "source"), "source": {"model": str(folder / "base")}}
    path = profile_file(folder, **models, search={"p": [0.1]})
    with pytest.raises(GainError, match="no better than the base"):
        run(folder, path)


@pytest.mark.parametrize("by", ["nll", "metric"])
def test_best_strength_on_validation_data_is_published(folder: Path, by: str) -> None:
    artifact = run(folder, profile_file(folder, transfer={"strength": [0.05, 1.0, 0.1], "by": by}))
    assert read_artifact(artifact)[0].localization.strength == 1.0
    tried = json.loads((artifact / "evaluation.json").read_text())["strengths_on_validation"]
    assert tried.keys() == {"0.05", "1", "0.1"}
    best = max(tried.values()) if by == "metric" else min(tried.values())
    assert tried["1"] == best != tried["0.05"]


def test_the_test_set_plays_no_part_in_the_search(folder: Path) -> None:
    path = profile_file(folder, search={"keep": 0.8, "p": SHARES}, transfer={"strength": [0.5, 1.0]})
    before = json.loads((run(folder, path) / "evaluation.json").read_text())
    write_examples(folder / "test.jsonl", said(range(16, 19)))
    after = json.loads((run(folder, path) / "evaluation.json").read_text())
    assert before["search"] == after["search"]
    assert before["strengths_on_validation"] == after["strengths_on_validation"]
    assert before["examples"] != after["examples"]


def test_what_the_test_examples_do_not_show_is_said_or_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = yaml.safe_load(profile_file(folder).read_text())["data"]
    nll = {"name": "demo_nll", "metric": "nll", "items": 4, "data": data}
    search = {"keep": 0.8, "p": SHARES}
    write_examples(folder / "test.jsonl", [Example(f"say {number}", "something else") for number in range(4)])
    told = io.StringIO()
    run(folder, profile_file(folder, search=search), told)
    assert "the source model is no better than the base on any task's test examples" in " ".join(
        told.getvalue().split()
    )
    write_examples(folder / "test.jsonl", said(range(12, 16)))
    monkeypatch.setattr("act_serve.pipeline.search.keeps", lambda *_: True)  # the luck of validation data
    with pytest.raises(
        GainError, match=r"too little of the source's gain on the test examples, where 80% was asked for"
    ):
        run(folder, profile_file(folder, search=search, score=[nll]))
    assert list(Store(folder / "store").versions("demo")) == [1]


def test_the_share_kept_on_the_test_examples_is_published(folder: Path) -> None:
    data = yaml.safe_load(profile_file(folder).read_text())["data"]
    nll = {"name": "demo_nll", "metric": "nll", "items": 4, "data": data}
    evaluation = json.loads((run(folder, profile_file(folder, score=[nll])) / "evaluation.json").read_text())
    (score,) = evaluation["scores"]
    share = evaluation["share_kept"]["demo_nll"]
    assert share["value"] == pytest.approx(
        (score["delta"] - score["base"]) / (score["source"] - score["base"]), abs=1e-3
    )
    low, high = share["interval"]
    assert low <= share["value"] <= high


def test_a_share_of_a_gain_that_the_examples_do_not_show_says_nothing() -> None:
    base, source = (Measured("exact_match", [[1, 1]] * right + [[0, 1]] * (100 - right)) for right in (50, 52))
    kept = kept_gain(base, source, base)
    assert kept is not None
    assert kept[0] == 0
    assert not gain_shows(base, source)
    assert lost_gain({"demo": kept}, 0.95, set())[1]


@pytest.mark.parametrize(
    ("deltas", "wanted", "missed", "by_chance"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.95, False, True),
        ([1.6, 1.6, 1.6, 1.6], 0.95, True, False),
        ([1.0, 1.0, 1.0, 1.4], 0.95, True, True),
    ],
    ids=["kept", "missed", "missed, maybe by chance"],
)
def test_chance_is_told_from_what_is_missing(deltas: list[float], wanted: float, missed: bool, by_chance: bool) -> None:
    base, source, delta = (
        Measured("nll", [[value, 1] for value in values]) for values in ([2.0] * 4, [1.0] * 4, deltas)
    )
    kept = {"demo": kept_gain(base, source, delta), "no gain": kept_gain(source, base, delta)}
    assert kept["no gain"] is None
    assert gain_shows(base, source)
    said, chance = lost_gain(kept, wanted, {"demo"})
    assert (bool(said), chance) == (missed, by_chance)


def test_part_of_the_training_file_is_held_out(tmp_path: Path) -> None:
    lines = [Example(f"prompt {number}", "x") for number in range(400)]
    write_examples(tmp_path / "all.jsonl", lines)
    data = Data(train=str(tmp_path / "all.jsonl"), test=str(tmp_path / "all.jsonl"))
    train, held_out = load_examples(data, "train", 400, 0), load_examples(data, "validation", 400, 0)
    assert sorted(map(str, train + held_out)) == sorted(map(str, lines))
    assert 5 < len(held_out) < 40
    assert all(split_of(example.prompt or "") == "validation" for example in held_out)
    write_examples(tmp_path / "all.jsonl", train[:3])
    with pytest.raises(DataError, match=r"the 3 lines of \S*all\.jsonl leave none for validation"):
        load_examples(data, "validation", 10, 0)


def test_keep_on_the_command_line_asks_for_a_search(folder: Path) -> None:
    result = CliRunner().invoke(app, ["build-delta", str(profile_file(folder)), "--keep", "0.8", "--plan"])
    assert result.exit_code == 0
    assert "1.0% or 2.0% or 5.0% or 10.0%" in " ".join(result.output.split())


def test_the_plan_counts_what_the_search_measures(folder: Path) -> None:
    profile = load_profile(profile_file(folder, search={"p": SHARES, "items": 4}))
    plan = make_plan(profile, folder / "base", said(range(2)))
    seconds = {stage.name: stage.seconds for stage in plan.stages}
    (search,) = [stage for stage in plan.stages if stage.name == "validate"]
    assert search.what == "at every p, demo_exact (4), demo_exact-nll (4)"
    # Base, source and two of each of three p on two tasks, against four variants on one, of 4 items all.
    assert seconds["validate"] == pytest.approx(seconds["evaluate"] * (8 * 2) / (4 * 1))
    assert "validate" not in [
        stage.name
        for stage in make_plan(profile.model_copy(update={"search": None}), folder / "base", said(range(2))).stages
    ]


@pytest.mark.parametrize(
    ("base", "source", "delta", "higher", "share"),
    [
        (2.0, 1.0, 1.2, False, 0.8),
        (0.2, 0.6, 0.5, True, 0.75),
        (1.0, 1.0, 1.0, False, None),
        (1.0, 2.0, 0.5, False, None),
    ],
)
def test_share_of_the_gain(base: float, source: float, delta: float, higher: bool, share: float | None) -> None:
    kept = kept_share(base, source, delta, higher_is_better=higher)
    assert kept == (share if share is None else pytest.approx(share))


def test_every_task_must_keep_its_share() -> None:
    assert keeps({"a": 0.95, "b": None}, 0.95)
    assert not keeps({"a": 1.0, "b": 0.94}, 0.95)
    assert not keeps({"a": None}, 0.5)
    assert not keeps({"a": float("nan")}, 0.5)
