"""The offline commands on a tiny model, as a user calls them."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from act_serve.cli.main import _out_of_memory, app, main
from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import (
    ActServeError,
    ArtifactDamagedError,
    DataError,
    ProfileError,
    RequestError,
    UnknownAbilityError,
)
from act_serve.pipeline import compose
from tests.pipeline.test_export import UP, publish
from tests.tiny_models import make_llama


@pytest.fixture
def home(tmp_path: Path) -> Path:
    base = make_llama(tmp_path / "base")
    rows = torch.arange(0, 64, 4, dtype=torch.int32)
    publish(tmp_path / "store", base, "one", {UP: ModuleDelta(rows, torch.ones(16, 32, dtype=torch.bfloat16))})
    (tmp_path / "task.jsonl").write_text('{"prompt": "say a", "answer": "aaaa"}\n{"prompt": "b", "answer": "b"}\n')
    return tmp_path


def call(*words: object) -> str:
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_eval_writes_scores(home: Path) -> None:
    common = ("--base", home / "base", "--store", home / "store", "--metric", "nll", "--json", home / "scores.json")
    said = call("eval", home / "task.jsonl", "--abilities", "one*0.5", *common)
    with_ability = json.loads((home / "scores.json").read_text())
    call("eval", home / "task.jsonl", "--items", 2, *common)
    alone = json.loads((home / "scores.json").read_text())
    assert "nll" in said
    assert with_ability["abilities"] == "one*0.5"
    assert with_ability["items"] == alone["items"] == 2
    assert with_ability["scores"]["nll"] != alone["scores"]["nll"]
    low, high = alone["intervals"]["nll"]
    assert low <= alone["scores"]["nll"] <= high
    assert "95 % interval" in said


@pytest.mark.parametrize(
    ("line", "metric", "said"),
    [
        ({"prompt": "x" * 400, "answer": "yes"}, "nll", "^nll: example 1 .* a prompt of 4.. tokens, .* cut at 320"),
        ({"text": "plain"}, "exact_match", "^exact_match: exact_match can't score .* plain text without a prompt"),
        ({"prompt": "x", "answer": "y"}, "language_share", "^metric 'language_share': the metric language_share needs"),
    ],
)
def test_eval_refuses_what_it_cannot_score(home: Path, line: dict[str, str], metric: str, said: str) -> None:
    (home / "task.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=said):
        call("eval", home / "task.jsonl", "--base", home / "base", "--store", home / "store", "--metric", metric)


def test_export_then_load(home: Path) -> None:
    call("export", "one", home / "merged", "--to", "hf", "--base", home / "base", "--store", home / "store")
    merged = AutoModelForCausalLM.from_pretrained(home / "merged").get_submodule(UP).weight
    base = AutoModelForCausalLM.from_pretrained(home / "base").get_submodule(UP).weight
    assert merged.dtype == base.dtype
    torch.testing.assert_close(merged[::4], base[::4] + 1)
    assert torch.equal(merged[1::4], base[1::4])


def test_inspect_shows_and_draws(home: Path) -> None:
    said = call("inspect", home / "store" / "one" / "1", "--png", home / "one.png")
    for word in ("one@1", "16 in 1 modules, 512 parameters", "up_proj │█│", "size of the changes"):
        assert word in said
    assert (home / "one.png").read_bytes().startswith(b"\x89PNG")
    call("inspect", home / "store" / "one" / "1", "--png", home / "new" / "one.png")
    assert (home / "new" / "one.png").exists()
    with pytest.raises(RequestError, match=r"can't be written to .*one\.png/two\.png"):
        call("inspect", home / "store" / "one" / "1", "--png", home / "one.png" / "two.png")


def test_descriptions_are_shown_as_they_were_written(home: Path) -> None:
    folder = home / "store" / "one" / "1"
    manifest = json.loads((folder / "ability.json").read_text())
    (folder / "ability.json").write_text(json.dumps({**manifest, "description": "Answers [json] after [/INST]."}))
    assert "Answers [json] after [/INST]." in call("inspect", folder)


def test_another_content_than_the_pinned_one_is_refused(home: Path) -> None:
    place = ("--base", home / "base", "--store", home / "store")
    digest = json.loads((home / "store" / "one" / "1" / "ability.json").read_text())["tensors_sha256"][:12]
    call("export", f"one@1~{digest}", home / "merged", "--to", "hf", *place)
    for words in (("export", "one@1~0123456789ab", home / "other", "--to", "hf", *place),
                  ("merge", "one@1~0123456789ab", "two", "--store", home / "store")):  # fmt: skip
        with pytest.raises(UnknownAbilityError, match="not 0123456789ab"):
            call(*words)


def test_inspect_refuses_damage(home: Path) -> None:
    path = home / "store" / "one" / "1" / "channel_delta.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactDamagedError):
        call("inspect", home / "store" / "one" / "1")


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "task.jsonl", "--metric", "nothing"),
        ("eval", "none.jsonl"),
        ("eval", "task.jsonl", "--abilities", "two"),
        ("eval", "task.jsonl", "--abilities", "one*nan"),
        ("export", "one+one", "merged"),
    ],
)
def test_mistakes_are_our_own_errors(home: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(ActServeError):
        call(*words, "--base", "base", "--store", "store")
    assert not (home / "merged").exists()


def test_scores_that_cannot_be_written_are_refused_before_anything_is_scored(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--base", home / "base", "--store", home / "store")
    call("eval", home / "task.jsonl", *common, "--metric", "nll", "--json", home / "new" / "scores.json")
    assert json.loads((home / "new" / "scores.json").read_text())["scores"]
    monkeypatch.setattr(compose, "score_composition", lambda **_: pytest.fail("scored first"))
    with pytest.raises(
        RequestError, match=r"can't be written to .*task\.jsonl/scores\.json: .*another file with --json"
    ):
        call("eval", home / "task.jsonl", *common, "--json", home / "task.jsonl" / "scores.json")


def test_too_little_memory_is_an_error_of_ours(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scored(**_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(compose, "score_composition", scored)
    monkeypatch.setattr(sys, "argv", ["act-serve", "eval", str(home / "task.jsonl")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ActServeError.exit_code
    assert (
        "act-serve: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); end what" in capsys.readouterr().err
    )


def test_errors_without_torch_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setitem(sys.modules, "act_serve.models.free_memory", None)
    assert not _out_of_memory(RuntimeError("out of memory"))
    assert _out_of_memory(MemoryError())


SHIPPED = Path(__file__).parents[2] / "profiles" / "abilities"


def test_share_to_keep_needs_an_ability_model(home: Path) -> None:
    with pytest.raises(ProfileError, match=r"es: --keep .* goes on from the ability es"):
        call("build-delta", SHIPPED / "es-2.yaml", "--keep", 0.95, "--plan")


def test_analysis_needs_an_ability_model(home: Path) -> None:
    with pytest.raises(ProfileError, match=r"es goes on from the ability es .* source\.model or source\.train"):
        call("analyze", SHIPPED / "es-2.yaml", "--out", home / "out", "--work", home / "work")
    assert not (home / "work").exists()


def test_an_analysis_holds_the_locks_of_its_builds(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        with FileLock(home / "work" / "extract" / "build.lock", timeout=0):
            raise AssertionError("nothing is locked")

    monkeypatch.setattr("act_serve.pipeline.analyze.subject.open_subjects", opened)
    with pytest.raises(Timeout):
        call("analyze", SHIPPED / "extract.yaml", "--out", home / "out", "--work", home / "work")


def test_ranking_that_cannot_go_layer_by_layer_is_refused_before_anything_runs(home: Path) -> None:
    for name in ("left", "right"):
        content = yaml.safe_load((SHIPPED / "extract.yaml").read_text())
        content |= {"name": name, "base": str(home / "base"), "localize": {"memory": "layerwise"}}
        (home / f"{name}.yaml").write_text(yaml.safe_dump(content))
    where = ("--ranking", "gradient", "--out", home / "out", "--work", home / "work")
    with pytest.raises(ProfileError, match=r"gradient .* left, right"):
        call("analyze", home / "left.yaml", home / "right.yaml", *where)
    assert not (home / "work").exists()
    assert not (home / "out").exists()


def test_all_profiles_are_checked_before_any_is_built(home: Path) -> None:
    (home / "bad.yaml").write_text("name: bad\n")
    shipped = Path(__file__).parents[2] / "profiles" / "abilities" / "extract.yaml"
    with pytest.raises(ProfileError, match=r"bad\.yaml:1"):
        call("build-delta", shipped, home / "bad.yaml", "--store", home / "store", "--work", home / "work")
    assert not (home / "work").exists()
