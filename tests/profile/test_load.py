"""A profile that is wrong says where and why; the shipped ones are right."""

from pathlib import Path

import pytest

from act_serve.errors import ProfileError
from act_serve.profile.load import load_profile

GOOD = """\
name: demo
description: A demonstration.
license: Apache-2.0
data: {train: train.jsonl, test: test.jsonl}
source: {model: ../source}
localize:
  p: 0.1
score:
  - {name: demo_nll, metric: nll, data: {test: test.jsonl}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "demo.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_files_are_relative_to_the_profile(tmp_path: Path) -> None:
    profile = load_profile(written(tmp_path, GOOD))
    assert profile.data.train == str(tmp_path / "train.jsonl")
    assert profile.score[0].data.test == str(tmp_path / "test.jsonl")
    assert profile.localize.ranking == "weight_relative"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  p: 0.1", "  p: 0", "demo.yaml:7: localize.p: Input should be greater than 0"),
        ("  p: 0.1", "  include: [biases]", "demo.yaml:7: localize.include.0: Input should be"),
        (
            "  p: 0.1",
            "  {include: [lm_head], memory: layerwise}",
            "of lm_head can't be ranked with `memory: layerwise`",
        ),
        (
            "{model: ../source}\nlocalize:",
            "{train: {items: 1, steps: 1}}\nlocalize:\n  include: [norms, embedding]",
            "embedding and norms would not differ",
        ),
        ("  p: 0.1", "  {p: 0.1, channels: 0.1}", "demo.yaml:6: localize: give one budget, not p and channels"),
        ("  p: 0.1", "  bytes: a lot", "demo.yaml:7: localize.bytes: could not parse"),
        ("  p: 0.1", "  pp: 0.1", "demo.yaml:7: localize.pp: unknown key"),
        ("name: demo", "name: De mo", "demo.yaml:1: name: String should match"),
        ("description: A demonstration.\n", "", "description: Field required"),
        ("metric: nll", "metric: bleu", "demo.yaml:9: score.0.metric: Input should be"),
        ("metric: nll", "metric: language_share", "needs a `language`"),
        ("localize:", "finetune: {retention: {}}\nlocalize:", "finetune.retention holds to the base on the text of"),
        ("{model: ../source}", "{}", "demo.yaml:5: source: give one of `model`"),
        ("{train: train.jsonl, test: test.jsonl}", "{maker: x, test: y}", "demo.yaml:4: data: name either"),
        ("name: demo", "name: [demo", "demo.yaml:2: not valid YAML"),
        ("localize:", "score: []\nlocalize:", "demo.yaml:9: not valid YAML: the key `score` stands in line 6 already"),
        ("  p: 0.1", "  p: 0.1\n  p: 0.2", "demo.yaml:8: not valid YAML: the key `p` stands in line 7 already"),
        ("metric: nll", "metric: nll, metric: chrf", "demo.yaml:9: not valid YAML: the key `metric` stands"),
        (GOOD, "- 1", "a profile is a mapping"),
    ],
)
def test_mistakes_name_line_and_field(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(ProfileError) as caught:
        load_profile(written(tmp_path, GOOD.replace(old, new)))
    assert said in str(caught.value)


def test_a_key_of_another_place_that_an_alias_brings_in_is_no_second_one(tmp_path: Path) -> None:
    task = "&task {name: demo_nll, metric: nll, data: {test: test.jsonl}}"
    text = GOOD.replace(task.removeprefix("&task "), task) + "  - {<<: *task, name: demo_chrf, metric: chrf}\n"
    profile = load_profile(written(tmp_path, text))
    assert [(task.name, task.metric) for task in profile.score] == [("demo_nll", "nll"), ("demo_chrf", "chrf")]


def test_retention_counts_the_tasks_of_the_profile_that_is_extended(tmp_path: Path) -> None:
    written(tmp_path, GOOD + "retain:\n  - {name: kept, metric: nll, data: {test: test.jsonl}}\n")
    more = tmp_path / "more.yaml"
    more.write_text("extends: demo.yaml\nfinetune: {retention: {}}\n", encoding="utf-8")
    assert load_profile(more).finetune.retention is not None


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="can't be read"):
        load_profile(tmp_path / "none.yaml")


SHIPPED = Path(__file__).parents[2] / "profiles" / "abilities"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles(path: Path) -> None:
    profile = load_profile(path)
    assert profile.name == path.stem.split("-")[0]
    assert len(profile.exemplars) >= 12
    assert all(task.items >= 200 for task in (*profile.score, *profile.retain))
    assert all(task.max_drop <= 0.03 for task in profile.retain)


def test_a_profile_takes_what_it_lacks_from_the_one_it_extends(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    more = tmp_path / "more.yaml"
    more.write_text("extends: demo.yaml\nsource: {ability: demo}\nlocalize:\nseed: 3\n", encoding="utf-8")
    profile, extended = load_profile(more), load_profile(tmp_path / "demo.yaml")
    assert (profile.seed, profile.source.ability) == (3, ("demo",))
    assert "localize" not in profile.model_fields_set
    assert (profile.name, profile.data, profile.score) == (extended.name, extended.data, extended.score)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: demo.yaml\nseed: x", "more.yaml:2: seed: Input should be a valid integer"),
        ("extends: demo.yaml\nsource: {}", "more.yaml:2: source: give one of `model`"),
        ("extends: demo.yaml\ndata:", "more.yaml:2: data: Field required"),
        ("extends: bad.yaml", "bad.yaml:7: localize.p: Input should be greater than 0"),
        ("seed: 1\nextends: ../demo.yaml", "more.yaml:2: extends: give the name of a profile in the same folder"),
        ("extends: [demo.yaml]", "more.yaml:1: extends: give the name"),
        ("extends: more.yaml", "more.yaml:1: extends: more.yaml extends this profile in turn"),
        ("extends: round.yaml", "round.yaml:1: extends: more.yaml extends this profile in turn"),
        ("extends: none.yaml", "none.yaml: can't be read"),
    ],
)
def test_mistakes_in_what_extends_another_name_the_right_file(tmp_path: Path, text: str, said: str) -> None:
    written(tmp_path, GOOD)
    (tmp_path / "bad.yaml").write_text(GOOD.replace("p: 0.1", "p: 0"), encoding="utf-8")
    (tmp_path / "round.yaml").write_text("extends: more.yaml", encoding="utf-8")
    more = tmp_path / "more.yaml"
    more.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError) as caught:
        load_profile(more)
    assert said in str(caught.value)
