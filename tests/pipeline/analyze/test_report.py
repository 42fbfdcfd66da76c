"""A whole analysis of two tiny abilities in planted rows: right numbers, and a report that stands alone."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from act_serve.abilities.store import Store
from act_serve.delta.channels import OUTSIDE
from act_serve.errors import BuildError, ProfileError
from act_serve.pipeline import memory_use
from act_serve.pipeline.analyze.analysis import COMPARED, PARTS, Options, Part, analyze, refuse_impossible
from act_serve.pipeline.analyze.measure_channels import measure_heat_maps
from act_serve.pipeline.analyze.report import check_writable, write_report
from act_serve.pipeline.analyze.subject import open_subjects
from act_serve.pipeline.localize import localize
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.run import build
from act_serve.profile.load import load_profile
from act_serve.profile.schema import Profile, Source
from tests.tiny_models import make_llama, plant

P = 0.125
PAIR = {"left": "abcdefgh", "right": "stuvwxyz"}


def profile(folder: Path, name: str, letters: str, **changes: Any) -> Profile:
    lines = [json.dumps({"prompt": f"say {a}{b}", "answer": f"{a}{b}" * 6}) for a in letters for b in letters]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    data = {"train": f"{name}.jsonl", "test": f"{name}.jsonl"}
    content = {
        "name": name,
        "description": "A demonstration.",
        "license": "Apache-2.0",
        "base": str(folder / "base"),
        "source": {"model": str(folder / name)},
        "data": data,
        "localize": {"p": P, "calibration_items": 12},
        "finetune": {"steps": 2, "batch_size": 2, "items": 5},
        "score": [{"name": f"{name}_nll", "metric": "nll", "items": 6, "data": data}],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_profile(path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    base = make_llama(folder / "base")
    for seed, name in enumerate(("left", "right"), start=1):
        rows = plant(base, folder / name, p=P, scale=0.3, seed=seed)
        (folder / f"{name}.rows").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def report(planted: Path) -> Path:
    profiles = [profile(planted, name, letters) for name, letters in PAIR.items()]
    subjects = open_subjects(profiles, planted / "work", Screen(Console(file=io.StringIO())))
    found = analyze(subjects, Options(shares=(0.05, P, 0.25)))
    return write_report(found, subjects, planted / "out")


@pytest.fixture(scope="module")
def numbers(report: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((report.parent / "analysis.json").read_text())
    return content


def test_planted_rows_carry_the_difference(numbers: dict[str, Any]) -> None:
    for record in numbers["records"]["concentration"]:
        assert record["top_shares"]["0.125"] > 2 * P
        assert record["channels"] == 512


def test_norms_head_and_embedding_are_analysed_where_included(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    plant(base, tmp_path / "left", p=P, scale=0.3, include=OUTSIDE)
    localize = {"p": P, "calibration_items": 12, "include": list(OUTSIDE), "ranking": "activation_weight"}
    made = profile(tmp_path, "left", "abcdefgh", localize=localize, finetune={"steps": 0})
    screen = Screen(Console(file=io.StringIO()))
    build(made, store=Store(tmp_path / "store"), work=tmp_path / "work" / "left", screen=screen)
    said = io.StringIO()
    subjects = open_subjects([made], tmp_path / "work", Screen(Console(file=said)))
    found = analyze(subjects, Options(shares=(P,)))
    write_report(found, subjects, tmp_path / "out")
    assert "calibrate              kept from an earlier run" in said.getvalue()
    records = json.loads((tmp_path / "out" / "analysis.json").read_text())["records"]
    assert records["concentration"][0]["channels"] == 512 + 5 * 32 + 259 + 32
    for record in measure_heat_maps(subjects[0]):
        assert record.mask_shares.keys() >= {"norm", "lm_head", "embed_tokens", "input_layernorm", "q_proj"}
        assert record.mask_shares["lm_head"].keys() == {0}


def test_chosen_rows_are_the_planted_ones(planted: Path, report: Path) -> None:
    screen = Screen(Console(file=io.StringIO()))
    subject = open_subjects([profile(planted, "left", "abcdefgh")], planted / "work", screen)[0]
    rows = json.loads((planted / "left.rows").read_text())
    for ranking in ("activation_per_module", "weight_per_module"):
        mask = subject.mask(subject.differences(subject.calibration, ranking), ranking, P)
        hits = sum(len(set(rows[name]) & set(mask[name].tolist())) for name in rows)
        assert hits / sum(map(len, rows.values())) >= 0.95


def test_other_rows_overlap_as_chance_has_it(numbers: dict[str, Any]) -> None:
    found = [r for r in numbers["records"]["disentanglement"] if (r["p"], r["ranking"]) == (P, "weight_per_module")]
    assert len(found) == 1
    assert found[0]["overlap"]["share"] == pytest.approx(found[0]["overlap"]["chance"], abs=0.1)
    assert numbers["verdicts"]["disentanglement"] == "holds"


def test_stable_where_the_rows_are(numbers: dict[str, Any]) -> None:
    found = [record for record in numbers["records"]["stability"] if record["p"] == P]
    assert len(found) == 6
    assert min(record["share"] for record in found) > 0.8


def test_chosen_rows_suffice_and_random_ones_do_not(numbers: dict[str, Any]) -> None:
    for record in numbers["records"]["sufficiency"]:
        kept = {
            name: (dict(map(tuple, points))[P] - record["base"]) / (record["source"] - record["base"])
            for name, points in record["curves"].items()
        }
        assert kept["chosen rows"] > 0.8
        assert kept["random rows"] < 0.6
        assert kept.keys() == {"chosen rows", "random rows", "chosen rows, fine-tuned", "random rows, fine-tuned"}


def test_the_smallest_share_is_said_to_be_chosen_on_test_data(report: Path) -> None:
    text = report.read_text()
    assert re.search(r"chosen rows(, fine-tuned)?, chosen and measured on the same test data\) is the smallest", text)
    assert text.count("The smallest p is chosen and measured on the same test data.") == len(PAIR)


def test_heat_map_shows_the_channels_that_the_build_transfers(planted: Path, report: Path) -> None:
    screen = Screen(Console(file=io.StringIO()))
    subject = open_subjects([profile(planted, "left", "abcdefgh")], planted / "work", screen)[0]
    paper, own = measure_heat_maps(subject)
    assert (paper.ranking, own.ranking) == ("activation_global", "weight_relative")
    settings = subject.job.profile.localize
    scores = subject.differences(subject.calibration, settings.ranking)
    transferred = localize(list(subject.modules), scores, settings, subject.job.profile.seed)
    counts = subject.channels
    for layer, share in own.mask_shares["q_proj"].items():
        name = f"model.layers.{layer}.self_attn.q_proj"
        assert share == len(transferred[name]) / counts[name]
    text = report.read_text()
    assert "<th>chosen by activation_global</th><th>chosen by weight_relative</th>" in text
    assert "The build transfers those of weight_relative." in text


class Page(HTMLParser):
    """Collects what a browser would fetch or show."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.addresses += [values[name] or "" for name in ("src", "href", "srcset", "data", "action") if name in values]


def test_report_has_every_section_and_fetches_nothing(report: Path) -> None:
    text = report.read_text()
    page = Page()
    page.feed(text)
    parts = ["concentration", "disentanglement", "sufficiency-left", "sufficiency-right", "stability"]
    parts += ["layers-left", "layers-right"]
    assert page.sections == parts
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert sum(address.startswith("data:") for address in page.addresses) == len(parts)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    for part in parts:
        assert (report.parent / f"{part}.png").read_bytes().startswith(b"\x89PNG")


def test_second_analysis_measures_nothing_again(planted: Path, report: Path) -> None:
    said = io.StringIO()
    profiles = [profile(planted, "left", "abcdefgh")]
    subjects = open_subjects(profiles, planted / "work", Screen(Console(file=said, width=120)))
    found = analyze(subjects, Options(shares=(0.05, P, 0.25)))
    stages = [line for line in said.getvalue().splitlines() if "✓" in line]
    assert stages
    assert all("kept from an earlier run" in line for line in stages)
    assert any("two abilities" in note for note in found.notes)


def test_builds_stages_are_used(planted: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    screen = Screen(Console(file=said, width=120))
    trained = profile(planted, "left", "abcdefgh", source={"train": {"items": 5, "steps": 2, "batch_size": 2}})
    build(trained, store=Store(tmp_path / "store"), work=tmp_path / "work" / "left", screen=screen)
    said.truncate(0)
    subjects = open_subjects([trained], tmp_path / "work", screen)
    analyze(subjects, Options(shares=(P,), skip=frozenset({"stability"})))
    kept = {line.split()[1] for line in said.getvalue().splitlines() if "kept from" in line}
    assert kept >= {"source", "calibrate", "localize", "transfer", "finetune"}


@pytest.mark.parametrize("memory", ["layerwise", "auto"])
def test_rankings_that_cannot_go_layer_by_layer_are_left_out(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    monkeypatch.setattr(memory_use, "free_bytes", lambda: 1)
    changes = {"localize": {"p": P, "calibration_items": 12, "memory": memory}}
    profiles = [profile(planted, name, letters, **changes) for name, letters in PAIR.items()]
    subjects = open_subjects(profiles, tmp_path, Screen(Console(file=io.StringIO())))
    skip: frozenset[Part] = frozenset(PARTS) - {"disentanglement"}
    found = analyze(subjects, Options(shares=(P,), skip=skip))
    compared = {record.ranking for record in found.records["disentanglement"]}
    assert compared == set(COMPARED) - {"gradient"}
    (note,) = found.notes
    assert re.search("not compared by gradient.* left, right .*one layer at a time. .*memory: together", note)


def test_profile_s_own_ranking_must_go_with_the_others_memory(planted: Path) -> None:
    left = profile(planted, "left", "abcdefgh", localize={"p": P, "ranking": "gradient"})
    right = profile(planted, "right", "stuvwxyz", localize={"p": P, "memory": "layerwise"})
    with pytest.raises(ProfileError, match="gradient"):
        refuse_impossible([left, right], Options())
    refuse_impossible([right, left], Options())
    refuse_impossible([left, right], Options(skip=frozenset({"disentanglement"})))
    refuse_impossible([right], Options(rankings=("gradient",)))


def test_profiles_that_go_on_from_an_ability_have_no_model_to_analyse(planted: Path, tmp_path: Path) -> None:
    going_on = profile(planted, "left", "abcdefgh").model_copy(update={"source": Source(ability="left@1")})
    with pytest.raises(ProfileError, match=r"left goes on from the ability left@1"):
        open_subjects([going_on], tmp_path, Screen(Console(file=io.StringIO())))


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuildError, match="--out"):
        check_writable(tmp_path / "file" / "out")


def test_a_look_at_the_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "out")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_profiles_that_cannot_be_compared(planted: Path, tmp_path: Path) -> None:
    left = profile(planted, "left", "abcdefgh")
    screen = Screen(Console(file=io.StringIO()))
    with pytest.raises(ProfileError, match="same name"):
        open_subjects([left, left], tmp_path, screen)
    other = make_llama(tmp_path / "base", seed=5)
    stranger = left.model_copy(update={"name": "stranger", "base": str(other)})
    with pytest.raises(ProfileError, match="one base"):
        open_subjects([left, stranger], tmp_path, screen)
