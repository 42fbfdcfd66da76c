"""`act-serve eval --lm-eval` on a task of a local file; nothing is fetched."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from act_serve.cli.main import app
from act_serve.delta.artifact import ModuleDelta
from act_serve.errors import ActServeError, DataError, MissingExtraError
from tests.pipeline.test_export import UP, publish
from tests.tiny_models import make_llama

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    base = make_llama(tmp_path / "base")
    rows = torch.arange(0, 64, 4, dtype=torch.int32)
    publish(tmp_path / "store", base, "one", {UP: ModuleDelta(rows, torch.ones(16, 32, dtype=torch.bfloat16))})
    questions = [
        {"question": f"say {c}", "choices": ["aa", "b", "cc"], "answer": i % 3} for i, c in enumerate("abcdef")
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "tasks").mkdir()
    for name, file in (("tiny_choice", "data.jsonl"), ("no_data", "missing.jsonl")):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, file=tmp_path / file))
    return tmp_path


def call(home: Path, tasks: str, *words: object) -> dict[str, object]:
    fixed = ["--base", home / "base", "--store", home / "store", "--lm-eval-include", home / "tasks"]
    command = ["eval", "--lm-eval", tasks, *fixed, "--json", home / "scores.json", *words]
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(word) for word in command])
    if isinstance(done.exception, ActServeError):
        raise done.exception
    assert done.exit_code == 0, done.output
    assert tasks in done.output
    return json.loads((home / "scores.json").read_text())


@pytest.mark.slow
def test_a_local_task_is_scored_with_the_composition(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    seen: list[list[float]] = []
    original = HFLM.loglikelihood

    def recorded(self: HFLM, *args: object, **options: object) -> list[tuple[float, bool]]:
        answers = original(self, *args, **options)
        seen.append([likelihood for likelihood, _ in answers])
        return answers

    monkeypatch.setattr(HFLM, "loglikelihood", recorded)
    scores = call(home, "tiny_choice", "--items", 4)["lm_eval"]
    assert isinstance(scores, list)
    assert [(s["task"], s["metric"], s["items"]) for s in scores] == [
        ("tiny_choice", "acc", 4),
        ("tiny_choice", "acc_norm", 4),
    ]
    assert all(s["score"] * 4 == int(s["score"] * 4) for s in scores)
    call(home, "tiny_choice", "--items", 4, "--abilities", "one")
    base, composed = seen
    assert len(base) == len(composed) == 12
    assert base != composed, "the abilities must be attached while the harness asks"


@pytest.mark.slow
def test_unknown_tasks_and_missing_data_are_said(home: Path) -> None:
    with pytest.raises(DataError, match="no_such_task"):
        call(home, "no_such_task")
    with pytest.raises(DataError, match="the data of no_data can't be had"):
        call(home, "no_data")


def test_without_the_harness_the_extra_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match="lm-eval"):
        call(home, "tiny_choice")


def test_a_file_or_tasks(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("")
    for words in ([], [str(tmp_path / "t.jsonl"), "--lm-eval", "piqa"]):
        done = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["eval", *words])
        assert done.exit_code == 2
        assert "--lm-eval" in done.output
