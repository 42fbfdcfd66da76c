"""`act-serve merge` on a tiny store: a new version with its parents, or the checkpoint that export gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from act_serve.abilities.changes import activate
from act_serve.abilities.store import Store
from act_serve.delta.artifact import read_artifact
from act_serve.errors import ActServeError, BaseMismatchError, ProfileError
from tests.abilities_for_tests import publish_random
from tests.cli.test_offline_commands import call
from tests.tiny_models import make_llama

RECIPE = """
merge_method: ties
models:
  - model: one
    parameters: {weight: 0.5, density: 0.25}
  - model: two@1
parameters: {density: 0.75}
dtype: float32
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = make_llama(tmp_path / "base")
    store = Store(tmp_path / "abilities")
    publish_random(store, base, "one", seed=1, share=0.5)
    publish_random(store, base, "two", seed=2, share=0.5)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sum_is_the_checkpoint_of_the_composition(home: Path) -> None:
    call("merge", "two*0.5+one", "merged", "--to", "hf", "--base", "base")
    call("export", "one+two*0.5", "exported", "--base", "base")
    left, right = (load_file(home / folder / "model.safetensors") for folder in ("merged", "exported"))
    base = load_file(home / "base" / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert any(not torch.equal(left[name], base[name]) for name in left)


def test_a_merge_is_a_new_version_with_its_parents(home: Path) -> None:
    assert "published both@1" in call("merge", "recipe.yaml", "both")
    assert "published both@2" in call("merge", "two+one", "both", "--method", "priority", "--stored", "int8")
    first, second = (read_artifact(home / "abilities" / "both" / version)[0] for version in ("1", "2"))
    assert first.localization is None
    assert first.merge is not None
    assert first.merge.method == "ties"
    assert [(p.name, p.weight, p.density) for p in first.merge.parents] == [("one", 0.5, 0.25), ("two", 1.0, 0.75)]
    assert first.merge.parents[0].tensors_sha256 == read_artifact(home / "abilities" / "one" / "1")[0].tensors_sha256
    assert second.merge is not None
    assert [parent.name for parent in second.merge.parents] == ["two", "one"]
    assert second.stored == "int8"
    evaluation = json.loads((home / "abilities" / "both" / "2" / "evaluation.json").read_text())
    assert evaluation["conflicts"].keys() == {"two@1+one@1"}
    assert evaluation["conflicts"]["two@1+one@1"]["rows"] > 0
    shown = call("inspect", "abilities/both/2")
    assert "two@1*1 + one@1*1 by priority" in shown


def test_a_version_that_requests_do_not_get_is_said_to_be_one(home: Path) -> None:
    merge = ("merge", "one+two", "both")
    assert "requests" not in call(*merge)
    activate(Store(home / "abilities"), "both", 1)
    said = call(*merge)
    assert "published both@2 in" in said
    assert "get both@1, as the store's state says" in said
    assert "act-serve ability activate both 2 --store abilities" in said


def test_dry_run_shows_conflicts_and_writes_nothing(home: Path) -> None:
    said = call("merge", "one+two", "--dry-run")
    for word in ("one@1 two@1", "shared rows", "mean cosine", "%"):
        assert word in said
    assert sorted(path.name for path in (home / "abilities").iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ties", "magic"), r"merge_method: unknown method 'magic'; known: sum, mean"),
        (("ties", "mean"), "recipe: the method mean keeps every value; leave density out"),
        (("0.25", "1.5"), r"models\.0\.parameters\.density: Input should be less than"),
        (("weight: 0.5", "weight: [0.1, 0.9]"), r"models\.0\.parameters\.weight: Input should be a valid number"),
        (("dtype", "slices"), r"recipe\.yaml:8: slices: unknown key"),
        ((RECIPE, "merge_method: sum\nmodels: []"), r"recipe\.yaml:2: models: give at least one"),
        (("dtype", "models: []\ndtype"), r"recipe\.yaml:8: not valid YAML: the key `models` stands in line 3 already"),
        ((RECIPE, "[1]"), "a recipe is a mapping that starts with `merge_method"),
    ],
)
def test_a_wrong_recipe_is_explained(home: Path, change: tuple[str, str], message: str) -> None:
    (home / "recipe.yaml").write_text(RECIPE.replace(*change))
    with pytest.raises(ProfileError, match=message):
        call("merge", "recipe.yaml", "both")


@pytest.mark.parametrize(
    "words",
    [
        ("one+two",),
        ("one+one", "both"),
        ("one+nobody", "both"),
        ("one*0+two", "both"),
        ("one+two", "Not A Name"),
        ("one+two", "both", "--method", "sum", "--density", "0.5"),
        ("recipe.yaml", "both", "--method", "sum"),
        ("none.yaml", "both"),
        ("one+two", "base", "--to", "hf", "--base", "base"),
    ],
)
def test_mistakes_are_our_own_errors(home: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(ActServeError):
        call("merge", *words)
    assert not (home / "abilities" / "both").exists()


def test_abilities_of_two_bases_do_not_merge(home: Path) -> None:
    other = make_llama(home / "other", seed=1)
    publish_random(Store(home / "abilities"), other, "three", seed=3)
    with pytest.raises(BaseMismatchError, match="three@1 does not fit"):
        call("merge", "one+three", "both")
    with pytest.raises(BaseMismatchError, match="one@1 does not fit"):
        call("merge", "one+two", "merged", "--to", "hf", "--base", "other")
