"""A whole build on a tiny pair: published, resumed, refused when it costs too much."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from act_serve.abilities.desired_state import AbilityState, DesiredState, write_state
from act_serve.abilities.store import Store
from act_serve.delta.artifact import read_artifact
from act_serve.delta.channels import OUTSIDE, kind_of
from act_serve.errors import (
    ArtifactDamagedError,
    BuildError,
    DataError,
    PairMismatchError,
    ProfileError,
    RetentionError,
    UnknownAbilityError,
)
from act_serve.models.answering import answers
from act_serve.models.examples import Example
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.pipeline import run as line
from act_serve.pipeline import tuned_rows
from act_serve.pipeline.measure import measure, questions_of
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.stages import run_stage
from act_serve.pipeline.training import Report
from act_serve.profile.load import load_profile
from tests.tiny_models import make_llama, make_mixture, plant

P = 0.125


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, list[int]]:
    base = make_llama(tmp_path / "base")
    return plant(base, tmp_path / "source", p=P, scale=0.3)


def profile_file(folder: Path, **changes: Any) -> Path:
    for name, texts in {"ability": "abcde", "other": "vwxyz"}.items():
        lines = [json.dumps({"prompt": f"say {letter}", "answer": letter * 12}) for letter in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    data = {"train": "ability.jsonl", "test": "ability.jsonl"}
    other = {"train": "other.jsonl", "test": "other.jsonl"}
    content = {
        "name": "demo",
        "description": "A demonstration.",
        "license": "Apache-2.0",
        "base": str(folder / "base"),
        "source": {"model": str(folder / "source")},
        "data": data,
        "localize": {"p": P, "calibration_items": 5},
        "finetune": {"steps": 3, "batch_size": 2, "items": 5, "retention": {"items_per_step": 1}},
        "score": [
            {"name": "demo_nll", "metric": "nll", "items": 5, "data": data},
            {"name": "demo_exact", "metric": "exact_match", "items": 5, "max_new_tokens": 4, "data": data},
        ],
        "retain": [{"name": "other", "metric": "nll", "items": 5, "max_drop": 1.0, "data": other}],
        **changes,
    }
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def build(folder: Path, path: Path) -> tuple[Path, str]:
    said = io.StringIO()
    screen = Screen(Console(file=said, width=140))
    artifact = line.build(load_profile(path), store=Store(folder / "store"), work=folder / "work", screen=screen)
    return artifact, said.getvalue()


def show_plan(folder: Path, path: Path) -> str:
    said = io.StringIO()
    line.show_plan(load_profile(path), Store(folder / "store"), Screen(Console(file=said, width=140)))
    return said.getvalue()


@pytest.mark.parametrize("ranking", ["activation_weight", "gradient"])
def test_a_mixture_of_experts_gets_an_ability_of_its_attention(tmp_path: Path, ranking: str) -> None:
    rows = plant(make_mixture(tmp_path / "base"), tmp_path / "source", p=P, scale=0.3)
    localize = {"p": P, "calibration_items": 5, "ranking": ranking}
    artifact, _ = build(tmp_path, profile_file(tmp_path, localize=localize))
    manifest, deltas = read_artifact(artifact)
    assert {name.rpartition(".")[2] for name in deltas} <= {"q_proj", "k_proj", "v_proj", "o_proj"}
    hits = sum(len(set(planted) & set(deltas[name].rows.tolist())) for name, planted in rows.items() if name in deltas)
    assert hits / manifest.counts.channels >= 0.8
    layerwise = profile_file(tmp_path, localize=localize | {"ranking": "activation_weight", "memory": "layerwise"})
    with pytest.raises(BuildError, match=r"mixture of experts, which can't go layer by layer; set localize.memory"):
        build(tmp_path, layerwise)


def test_build_publishes_the_planted_rows(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    artifact, said = build(tmp_path, profile_file(tmp_path))
    assert artifact == tmp_path / "store" / "demo" / "1"
    manifest, deltas = read_artifact(artifact)
    hits = sum(len(set(rows) & set(deltas[name].rows.tolist())) for name, rows in pair.items())
    assert hits / sum(map(len, pair.values())) >= 0.95
    assert manifest.localization.fine_tune_steps == 3
    scores = {score.task: score for score in manifest.scores}
    assert set(scores) == {"demo_nll", "demo_exact", "other"}
    assert scores["other"].retained
    assert not scores["demo_nll"].retained
    assert abs(scores["demo_nll"].transfer - scores["demo_nll"].source) < abs(
        scores["demo_nll"].base - scores["demo_nll"].source
    )
    evaluation = json.loads((artifact / "evaluation.json").read_text())
    assert evaluation["composed_with"] == {}
    for word in ("transfer", "finetune", "memory", "published"):
        assert word in said
    assert re.search(r"finetune +\d+ s, [\d,]+ MiB of memory more", said)


def test_norms_head_and_embedding_are_built_and_trained_where_included(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", tied=True)
    planted = plant(base, tmp_path / "source", p=P, scale=0.3, include=OUTSIDE)
    localize = {"p": P, "calibration_items": 5, "ranking": "weight_per_module"}
    without, _ = build(tmp_path, profile_file(tmp_path, localize=localize))
    assert all(kind_of(name) == "linear" for name in read_artifact(without)[1])
    localize["include"] = ["norms", "lm_head", "embedding"]
    plain, _ = build(tmp_path, profile_file(tmp_path, localize=localize, finetune={"steps": 0}))
    artifact, said = build(tmp_path, profile_file(tmp_path, localize=localize))
    assert "linear + embedding + lm_head + norms parameters" in said
    manifest, deltas = read_artifact(artifact)
    assert {kind_of(name) for name in deltas} == {"linear", *OUTSIDE}
    assert set(manifest.localization.include) == set(OUTSIDE)
    assert read_artifact(without)[0].localization.include == ()
    for name in ("model.norm", "model.layers.0.input_layernorm"):  # of lm_head, the tied source changes every row
        assert set(deltas[name].rows.tolist()) == set(planted[name])
    assert (manifest.modules["lm_head"].out_features, manifest.modules["lm_head"].in_features) == (259, 32)
    assert (manifest.modules["model.norm"].out_features, manifest.modules["model.norm"].in_features) == (32, 1)
    assert (manifest.modules["model.embed_tokens"].out_features, deltas["model.embed_tokens"].delta.shape[1]) == (
        32,
        259,
    )
    before = read_artifact(plain)[1]
    trained = {kind_of(name) for name in deltas if not torch.equal(deltas[name].delta, before[name].delta)}
    assert trained == {"linear", *OUTSIDE}
    scores = {score.task: score for score in manifest.scores}
    assert abs(scores["demo_nll"].transfer - scores["demo_nll"].source) < abs(
        scores["demo_nll"].base - scores["demo_nll"].source
    )


def test_second_build_keeps_every_stage_and_counts_up(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    path = profile_file(tmp_path)
    first, _ = build(tmp_path, path)
    second, said = build(tmp_path, path)
    assert said.count("kept from an earlier run") == said.count("✓") == 8
    assert second.name == "2"
    assert read_artifact(first)[0].tensors_sha256 == read_artifact(second)[0].tensors_sha256


def test_interrupted_build_goes_on(tmp_path: Path, pair: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    path = profile_file(tmp_path)

    def fails(**_: Any) -> None:
        raise BuildError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(tuned_rows, "finetune", fails)
        with pytest.raises(BuildError):
            build(tmp_path, path)
    assert not (tmp_path / "store").exists()
    assert not list((tmp_path / "work").glob(".*"))
    _, said = build(tmp_path, path)
    kept = [text.split()[1] for text in said.splitlines() if "kept from" in text]
    assert kept == ["calibrate", "localize", "transfer"]


def test_a_build_holds_the_lock_of_its_folder(
    tmp_path: Path, pair: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def alone(folder: Path, _note: object) -> AbstractContextManager[None]:
        held.append(folder)
        return nullcontext()

    monkeypatch.setattr(line, "alone_in", alone)
    build(tmp_path, profile_file(tmp_path, finetune={"steps": 0}))
    assert held == [tmp_path / "work"]


def test_changed_setting_repeats_only_what_depends_on_it(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    build(tmp_path, profile_file(tmp_path))
    _, said = build(tmp_path, profile_file(tmp_path, transfer={"strength": 0.5}))
    kept = [text.split()[1] for text in said.splitlines() if "kept from" in text]
    assert kept == ["calibrate", "localize", "evaluate-base", "evaluate-source"]


def kept_after(folder: Path, change: Callable[[], None], **settings: Any) -> list[str]:
    """The stages that a second build takes from the first after a change of its models."""
    build(folder, profile_file(folder, **settings))
    change()
    _, said = build(folder, profile_file(folder, **settings))
    return [text.split()[1] for text in said.splitlines() if "kept from" in text]


def change_row(folder: Path) -> None:
    """Changes a row in the middle of nowhere: neither the first nor the last of its tensor, nor at its half."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][7] += 3.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_row_of_the_source_that_changed_repeats_what_depends_on_it(
    tmp_path: Path, pair: dict[str, list[int]]
) -> None:
    assert kept_after(tmp_path, lambda: change_row(tmp_path / "source")) == ["evaluate-base"]
    first, second = (read_artifact(tmp_path / "store" / "demo" / str(version))[0] for version in (1, 2))
    assert first.tensors_sha256 != second.tensors_sha256


def test_a_row_of_the_base_that_changed_repeats_all_but_the_source(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    assert kept_after(tmp_path, lambda: change_row(tmp_path / "base")) == ["evaluate-source"]


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"])
def test_what_stands_around_the_base_s_weights_counts(tmp_path: Path, pair: dict[str, list[int]], file: str) -> None:
    path = tmp_path / "base" / file
    assert path.exists()
    assert kept_after(tmp_path, lambda: path.write_text(path.read_text() + "\n")) == ["evaluate-source"]


def test_an_ability_that_goes_on_is_trained_again_on_a_base_that_changed(
    tmp_path: Path, pair: dict[str, list[int]]
) -> None:
    build(tmp_path, profile_file(tmp_path))
    content = yaml.safe_load(profile_file(tmp_path, source={"ability": "demo@1"}).read_text())
    del content["localize"]
    path = tmp_path / "more.yaml"
    path.write_text(yaml.safe_dump(content | {"name": "more", "retain": [], "finetune": {"steps": 2, "items": 5}}))
    build(tmp_path, path)
    change_row(tmp_path / "base")
    _, said = build(tmp_path, path)
    assert "kept from" not in said


def test_neighbours_are_measured_together(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    _, alone = build(tmp_path, profile_file(tmp_path, name="first"))
    artifact, said = build(tmp_path, profile_file(tmp_path))
    assert "the same beside first@1" in said
    assert "the same beside" not in alone
    evaluation = json.loads((artifact / "evaluation.json").read_text())
    together = evaluation["composed_with"]
    for label, scores in together.items():
        intervals = evaluation["composed_intervals"][label]
        assert all(low <= scores[task] <= high for task, (low, high) in intervals.items())
        assert intervals.keys() == scores.keys()
    assert together.keys() == {"first@1"}
    assert together["first@1"].keys() == {"demo_nll", "demo_exact", "other"}
    conflict = evaluation["conflicts"]["first@1"]
    assert conflict["rows"] == sum(map(len, pair.values()))
    assert conflict["share"] == conflict["cosine"] == 1.0


def test_neighbours_are_those_that_requests_get(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    for name in ("first", "second", "third"):
        build(tmp_path, profile_file(tmp_path, name=name))
    for scale in (1, 2):
        build(tmp_path, profile_file(tmp_path, name="first", transfer={"strength": scale / 2}))
    store = Store(tmp_path / "store")
    state = DesiredState().having("first", AbilityState(active=2)).having("second", AbilityState(removed={1: 0.0}))
    write_state(store.root, state)
    third = store.path("third", 1) / "channel_delta.safetensors"
    third.write_bytes(third.read_bytes()[:-40])
    artifact, said = build(tmp_path, profile_file(tmp_path))
    assert json.loads((artifact / "evaluation.json").read_text())["composed_with"].keys() == {"first@2"}
    assert "warning: nothing is measured beside third@1" in " ".join(said.split())
    (store.path("third", 1) / "ability.json").write_text("{")
    _, said = build(tmp_path, profile_file(tmp_path))
    assert "warning: nothing is measured beside third: " in " ".join(said.split())
    with pytest.raises(ArtifactDamagedError, match="third@1"):
        build(tmp_path, profile_file(tmp_path, finetune={"steps": 1, "company": ["third"]}))
    with pytest.raises(BuildError, match="names second, which"):
        build(tmp_path, profile_file(tmp_path, finetune={"steps": 1, "company": ["second"]}))


def test_int8_is_measured_as_it_is_stored(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    build(tmp_path, profile_file(tmp_path))
    artifact, said = build(tmp_path, profile_file(tmp_path, stored="int8"))
    manifest, deltas = read_artifact(artifact)
    assert manifest.stored == "int8"
    kept = [text.split()[1] for text in said.splitlines() if "kept from" in text]
    assert kept == ["calibrate", "localize", "transfer", "finetune", "evaluate-base", "evaluate-source"]
    profile = load_profile(tmp_path / "demo.yaml")
    again = measure(tmp_path / "base", [deltas], questions_of(profile))
    assert {score.task: score.delta for score in manifest.scores} == pytest.approx(again, abs=1e-5)


def test_interrupted_fine_tuning_goes_on_inside_the_stage(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    path = profile_file(tmp_path, finetune={"steps": 20, "batch_size": 2, "items": 5})
    seen: list[int] = []

    class Watching(Screen):
        @contextmanager
        def stage(self, name: str) -> Iterator[Report]:
            def report(done: int, _total: int, _remark: str) -> None:
                seen.append(done)
                if seen == list(range(1, 14)):
                    raise KeyboardInterrupt

            yield report

    def run() -> Path:
        screen = Watching(Console(file=io.StringIO()))
        return line.build(load_profile(path), store=Store(tmp_path / "store"), work=tmp_path / "work", screen=screen)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list((tmp_path / "work").glob(".unfinished-*/checkpoint-12"))
    seen.append(0)
    artifact = run()
    assert seen[14:] == list(range(13, 21))
    assert not list((tmp_path / "work").glob(".unfinished-*"))
    assert "finetune" in json.loads((artifact / "evaluation.json").read_text())["peak_bytes"]


def too_large_for_python() -> None:
    raise MemoryError


def too_large_for_the_gpu() -> None:
    raise torch.OutOfMemoryError("of the GPU")


def too_large_for_main_memory() -> None:
    torch.empty(10**15)


@pytest.mark.parametrize("too_large", [too_large_for_python, too_large_for_the_gpu, too_large_for_main_memory])
def test_stage_without_memory_keeps_the_earlier_ones(tmp_path: Path, too_large: Callable[[], None]) -> None:
    def fails(_folder: Path) -> None:
        too_large()

    run_stage(tmp_path, "first", {}, lambda _folder: None)
    with pytest.raises(BuildError, match="second ran out of memory"):
        run_stage(tmp_path, "second", {}, fails)
    assert run_stage(tmp_path, "first", {}, fails).resumed
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_mistake_in_a_stage_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    def fails(_folder: Path) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_stage(tmp_path, "first", {}, fails)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_the_stage_took_itself(tmp_path: Path) -> None:
    held: list[torch.Tensor] = []
    large = run_stage(tmp_path, "large", {}, lambda _folder: held.append(torch.ones(2**28, dtype=torch.uint8)))
    small = run_stage(tmp_path, "small", {}, lambda _folder: held.append(torch.ones(2**26, dtype=torch.uint8)))
    # The kernel counts a process's pages to within a few hundred.
    assert 0.9 * 2**28 < large.peak_bytes < 1.5 * 2**28
    assert 0.9 * 2**26 < small.peak_bytes < 1.5 * 2**26


def test_costly_ability_is_not_published(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    base = tmp_path / "base"
    prompt = Example("say something", "")
    # What the base itself says is what any change makes less likely.
    said = answers(load_model(base), load_tokenizer(base), [prompt], max_new_tokens=20)[0]
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": prompt.prompt, "answer": said}))
    own = {"train": "own.jsonl", "test": "own.jsonl"}
    retain = [{"name": "own", "metric": "nll", "items": 1, "max_drop": 0.03, "data": own}]
    path = profile_file(tmp_path, transfer={"strength": 2.0}, finetune={"steps": 0}, retain=retain)
    with pytest.raises(RetentionError, match=r"own \(nll\) went from"):
        build(tmp_path, path)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("part", ["score", "retain", "trained", "searched", "strengths"])
@pytest.mark.parametrize("plan", [False, True])
def test_data_of_every_stage_are_read_before_the_first(
    tmp_path: Path, pair: dict[str, list[int]], part: str, plan: bool
) -> None:
    own = {"train": "ability.jsonl", "validation": "ability.jsonl", "test": "ability.jsonl"}
    (tmp_path / "empty.jsonl").write_text("\n")
    task = {"metric": "nll", "items": 5}
    changes: dict[str, Any] = {
        "score": {"score": [{"name": "mine", "data": own | {"test": "typo.jsonl"}, **task}]},
        "retain": {"retain": [{"name": "other", "data": own | {"test": "empty.jsonl"}, **task}]},
        "trained": {"retain": [{"name": "other", "data": own, "train_data": own | {"train": "typo.jsonl"}, **task}]},
        "searched": {
            "search": {"p": [P]},
            "score": [{"name": "mine", "data": own | {"validation": "typo.jsonl"}, **task}],
        },
        "strengths": {
            "transfer": {"strength": [0.5, 1.0]},
            "score": [{"name": "mine", "data": own | {"validation": "empty.jsonl"}, **task}],
        },
    }
    path = profile_file(tmp_path, **changes[part])
    with pytest.raises(DataError, match=r"typo\.jsonl|no (test|validation) examples"):
        show_plan(tmp_path, path) if plan else build(tmp_path, path)
    assert not (tmp_path / "work").exists()


def test_a_split_that_no_stage_reads_may_be_missing(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    only_test = {"name": "other", "metric": "nll", "items": 5, "data": {"test": "other.jsonl"}}
    path = profile_file(tmp_path, retain=[only_test], finetune={"steps": 3, "items": 5})
    assert "finetune" in show_plan(tmp_path, path)


def test_the_plan_checks_pair_parent_and_company(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    make_llama(tmp_path / "wide", hidden=64)
    with pytest.raises(PairMismatchError, match="hidden_size"):
        show_plan(tmp_path, profile_file(tmp_path, source={"model": str(tmp_path / "wide")}))
    with pytest.raises(BuildError, match=r"finetune\.company names absent"):
        show_plan(tmp_path, profile_file(tmp_path, finetune={"steps": 3, "company": ["absent"]}))
    path = profile_file(tmp_path, source={"ability": "absent"})
    content = yaml.safe_load(path.read_text())
    del content["localize"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UnknownAbilityError, match="absent"):
        show_plan(tmp_path, path)


def test_a_build_says_what_no_row_carries(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    path = profile_file(tmp_path)
    said = show_plan(tmp_path, path)
    assert "compute differently" not in said
    assert "not kept" not in said
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    artifact, said = build(tmp_path, path)
    said = " ".join(said.split())
    assert "rope_theta (10000.0 in the base, 1000000.0 in the ability model)" in said
    assert "not kept: 1 other tensors that differ" in said
    assert "rope_theta" not in (artifact / "evaluation.json").read_text()


def test_pair_that_does_not_fit(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    make_llama(tmp_path / "wide", hidden=64)
    with pytest.raises(PairMismatchError, match="hidden_size"):
        build(tmp_path, profile_file(tmp_path, source={"model": str(tmp_path / "wide")}))


def test_a_published_ability_is_trained_further_without_its_model(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    first, _ = build(tmp_path, profile_file(tmp_path))
    (tmp_path / "source").rename(tmp_path / "gone")
    tune = {"steps": 4, "batch_size": 2, "items": 5, "learning_rate": 1e-2}
    path = profile_file(tmp_path, source={"ability": "demo@1"}, finetune=tune)
    content = yaml.safe_load(path.read_text())
    del content["localize"]
    content["score"][1]["items"] = 3
    path.write_text(yaml.safe_dump(content))
    second, said = build(tmp_path, path)
    assert second.name == "2"
    (before, rows), (after, tuned) = read_artifact(first), read_artifact(second)
    assert all(torch.equal(rows[name].rows, tuned[name].rows) for name in rows)
    assert any(not torch.equal(rows[name].delta, tuned[name].delta) for name in rows)
    assert after.source == f"trained on from demo@1~{before.digest}"
    assert after.source_fingerprint == before.source_fingerprint
    assert after.localization == before.localization.model_copy(update={"fine_tune_steps": 7})
    was, now = ({score.task: score for score in manifest.scores} for manifest in (before, after))
    assert now["demo_nll"].delta < was["demo_nll"].delta
    assert now["demo_nll"].source == was["demo_nll"].source is not None
    assert now["demo_nll"].transfer == was["demo_nll"].transfer is not None
    assert now["demo_exact"].source is None, "it was measured on other examples"
    assert "evaluate-source" not in said
    again, said = build(tmp_path, path)
    assert again.name == "3"
    assert said.count("kept from an earlier run") == said.count("✓")
    content["score"][1] |= {"items": 4, "max_new_tokens": 7}
    content["score"][0]["max_new_tokens"] = 7
    path.write_text(yaml.safe_dump(content))
    scores = {score.task: score for score in read_artifact(build(tmp_path, path)[0])[0].scores}
    assert scores["demo_exact"].source is None, "it was asked otherwise"
    assert scores["demo_nll"].source is not None, "a likelihood is asked in one way only"


def test_the_mean_of_versions_is_published_without_training(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    first, _ = build(tmp_path, profile_file(tmp_path))
    second, _ = build(tmp_path, profile_file(tmp_path, finetune={"steps": 6, "batch_size": 2, "items": 5}))
    path = profile_file(tmp_path, source={"ability": ["demo@1", "demo@2"]}, finetune={"steps": 0})
    content = yaml.safe_load(path.read_text())
    del content["localize"]
    path.write_text(yaml.safe_dump(content))
    third, said = build(tmp_path, path)
    assert "take the mean of the rows of demo@1, demo@2" in " ".join(said.split())
    (one, rows), (two, others), (mean, found) = (read_artifact(folder) for folder in (first, second, third))
    assert any(not torch.equal(rows[name].delta, others[name].delta) for name in rows)
    for name, module in found.items():
        assert torch.equal(module.rows, rows[name].rows)
        expected = (rows[name].delta.float() + others[name].delta.float()) / 2
        torch.testing.assert_close(module.delta.float(), expected, rtol=2**-8, atol=0)
    assert mean.source == f"the mean of demo@1~{one.digest}, demo@2~{two.digest}"
    assert mean.localization is not None
    assert mean.localization.fine_tune_steps == 6
    scores = {score.task: score for score in mean.scores}
    assert scores["demo_nll"].source is not None
    path.write_text(yaml.safe_dump({**content, "source": {"ability": ["demo@1", "demo@1"]}}))
    with pytest.raises(ProfileError, match="twice"):
        load_profile(path)


def test_what_an_ability_goes_on_from_must_fit(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    path = profile_file(tmp_path, source={"ability": "absent"})
    with pytest.raises(ProfileError, match="brings its rows and no model"):
        load_profile(path)
    content = yaml.safe_load(path.read_text())
    del content["localize"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UnknownAbilityError, match="absent"):
        build(tmp_path, path)
    path.write_text(yaml.safe_dump({**content, "source": {"ability": "Up/../"}}))
    with pytest.raises(ProfileError, match="ability"):
        load_profile(path)
    path.write_text(yaml.safe_dump({**content, "source": {"ability": "demo", "model": "base"}}))
    with pytest.raises(ProfileError, match="give one of"):
        load_profile(path)
    path.write_text(yaml.safe_dump({**content, "finetune": {"steps": 0}}))
    with pytest.raises(ProfileError, match="nothing would change"):
        load_profile(path)


def test_source_trained_by_the_build(tmp_path: Path, pair: dict[str, list[int]]) -> None:
    train = {"train": {"items": 5, "steps": 3, "batch_size": 2}}
    artifact, said = build(tmp_path, profile_file(tmp_path, source=train))
    assert "train the ability model densely, 3 steps" in said
    assert (tmp_path / "work" / "source" / "model" / "config.json").exists()
    assert read_artifact(artifact)[0].source_fingerprint is not None


def test_source_is_trained_with_a_tokenizer_that_has_no_pad_token(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    assert load_tokenizer(base).pad_token_id is None
    train = {"train": {"items": 5, "steps": 3, "batch_size": 2}}
    artifact, _ = build(tmp_path, profile_file(tmp_path, source=train, finetune={"steps": 0}))
    assert read_artifact(artifact)[0].counts.channels
