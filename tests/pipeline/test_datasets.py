"""What is tested was never trained on, and missing data says what to do."""

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets import catalogue, debian_package, english_prose, libreoffice_help
from act_serve.pipeline.datasets.catalogue import (
    examples_hash,
    load_examples,
    read_examples,
    task_examples,
    write_examples,
)
from act_serve.pipeline.datasets.order_notes import KEYS, PROMPTS, UNSEEN_PLAIN, order_notes
from act_serve.pipeline.datasets.problem_texts import PROBLEMS, UNSEEN_PROBLEMS
from act_serve.pipeline.datasets.splits import Split
from act_serve.pipeline.datasets.word_problems import word_problems
from act_serve.pipeline.scorers import answer_score
from act_serve.pipeline.tuned_rows import retained_text
from act_serve.profile.load import load_profile
from act_serve.profile.schema import Data, Task

PROFILES = sorted((Path(__file__).parents[2] / "profiles").rglob("*.yaml"))
FIELDS = ("buyer", "city", "item", "date")


def orders(split: str, count: int) -> list[dict[str, str]]:
    return [json.loads(example.answer) for example in order_notes(split, count, 0)]


def test_no_test_word_was_trained_on() -> None:
    train, test = orders("train", 4000), orders("test", 400)
    for field in FIELDS:
        seen, asked = ({order[field] for order in part} for part in (train, test))
        assert len(asked) > 50
        assert not seen & asked
    nouns = {order["item"].split()[-1] for order in train}
    assert not nouns & {order["item"].split()[-1] for order in test}


def test_every_note_says_its_order() -> None:
    for example in order_notes("test", 100, 1):
        order = json.loads(example.answer)
        assert example.prompt is not None
        for field in ("buyer", "city", "item"):
            assert order[field].lower() in example.prompt.lower()
        assert order["date"][:4] in example.prompt


def test_answers_have_the_keys_that_prompts_name_or_all() -> None:
    for split in get_args(Split):
        for example in order_notes(split, 100, 1, keys=["some"]):
            assert example.prompt is not None
            order = json.loads(example.answer)
            assert 0 < len(order) < 5
            places = [example.prompt.index(KEYS[key]) for key in order]
            assert places == sorted(places), "in the prompt's order"
        for example in order_notes(split, 100, 1, keys=["none"]):
            assert example.prompt is not None
            assert list(json.loads(example.answer)) == list(KEYS)
            assert "JSON" in example.prompt.upper()
            assert not any(key in example.prompt for key in ("buyer,", "qty", "YYYY"))
    wordings = {split: {_wording(each) for each in order_notes(split, 300, 1, ["none"])} for split in ("train", "test")}
    assert len(wordings["test"]) > 1
    assert not wordings["train"] & wordings["test"]
    mixed = order_notes("train", 4, 1, keys=["all", "none"])
    assert [KEYS["date"] in (each.prompt or "") for each in mixed] == [True, False, True, False]


def _wording(example: Example) -> str:
    """What a plain prompt says before or after the note."""
    (found,) = (wording for wording in (*PROMPTS["none"], *UNSEEN_PLAIN) if _fits(wording, example))
    return found


def _fits(wording: str, example: Example) -> bool:
    before, after = wording.split("{note}")
    return (example.prompt or "").startswith(before) and (example.prompt or "").endswith(after)


@pytest.mark.parametrize("keys", ["all", [], ["every"], 1])
def test_unknown_keys_of_notes_are_named(keys: Any) -> None:
    with pytest.raises(DataError, match="expected a list of some of all, some, none"):
        load_examples(Data(maker="order_notes", options={"keys": keys}), "train", 1, 0)


def test_same_seed_same_data() -> None:
    assert examples_hash(order_notes("train", 50, 3)) == examples_hash(order_notes("train", 50, 3))
    assert examples_hash(order_notes("train", 50, 3)) != examples_hash(order_notes("train", 50, 4))


def help_folder(root: Path, pages: int) -> None:
    for language, word in (("en-US", "window"), ("fr", "fenêtre")):
        folder = root / libreoffice_help.HELP / language / "text"
        folder.mkdir(parents=True)
        for page in range(pages):
            mark = "x" * (page % 7 + 1) + f" {chr(97 + page % 26)}"
            said = (
                f"Cette {word} affiche {mark} aussitôt." if language == "fr" else f"The {word} <b>shows</b> {mark} now."
            )
            own = f'<h2 id="hd_id1">Nr. {page} {word}</h2><p id="par_id1">{said}</p>'
            same = '<p id="par_id2">Same text in both of these languages</p>'
            (folder / f"{page}.html").write_text(f"<html><body>{own}{same}</body></html>", encoding="utf-8")


@pytest.fixture
def help_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    help_folder(tmp_path, 80)
    monkeypatch.setenv(debian_package.FOLDER_VARIABLE, str(tmp_path))
    caches = (libreoffice_help._pairs, libreoffice_help._explanations, libreoffice_help._later_explanations)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def lessons(split: Split, *names: str, count: int = 999) -> list[Example]:
    return load_examples(Data(maker="libreoffice_help", options={"lessons": names} if names else {}), split, count, 0)


@pytest.mark.usefixtures("help_pages")
def test_parallel_paragraphs_are_aligned_and_split() -> None:
    train, test = lessons("train"), lessons("test")
    assert not {example.answer for example in train} & {example.answer for example in test}
    assert all(example.answer.startswith("Cette fenêtre affiche") for example in train)
    assert all((example.prompt or "").startswith("Translate to French: The window") for example in test)
    assert lessons("train", "into") == train


@pytest.mark.usefixtures("help_pages")
def test_lessons_from_and_in_the_language_share_no_text_with_tests() -> None:
    held_out = {example.answer for split in ("test", "validation") for example in lessons(split)}
    back, told = lessons("train", "from"), lessons("train", "explain")
    assert all(example.answer.startswith("The window shows") for example in back)
    assert {(example.prompt or "").split(":")[0] for example in back} > {"Translate to English", "Traduis en anglais "}
    assert all(example.answer.startswith("Cette fenêtre affiche") for example in told)
    assert all("fenêtre" in (example.prompt or "") for example in told)
    for example in (*back, *told):
        assert not any(text in f"{example.prompt} {example.answer}" for text in held_out)


@pytest.mark.usefixtures("help_pages")
def test_a_paragraph_below_headings_of_several_splits_is_explained_in_the_last_one_alone(tmp_path: Path) -> None:
    def answers(split: Split) -> set[str]:
        return {example.answer for example in lessons(split, "explain")}

    before = {split: answers(split) for split in get_args(Split)}
    shared = "Ce paragraphe se trouve dans beaucoup de pages."
    for page in (tmp_path / libreoffice_help.HELP / "fr" / "text").iterdir():
        heading = f'<h2 id="hd_id3">Plus sur {page.stem}</h2><p id="par_id4">{shared}</p></body>'
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", heading), encoding="utf-8")
    libreoffice_help._explanations.cache_clear()
    libreoffice_help._later_explanations.cache_clear()
    assert {split: answers(split) for split in get_args(Split)} == before | {"test": before["test"] | {shared}}


def test_paragraphs_that_topics_of_python_share_are_in_one_split() -> None:
    seen: set[Example] = set()
    for split in ("test", "validation", "train"):
        found = english_prose.python_reference(split, 10_000, 0)
        assert found
        assert not seen & set(found)
        assert english_prose.python_reference(split, 3, 0) == found[:3]
        seen.update(found)


@pytest.mark.usefixtures("help_pages")
def test_a_lesson_named_twice_comes_twice_as_often() -> None:
    mixed = lessons("train", "into", "into", "from", count=40)
    english = [example for example in mixed if example.answer.startswith("The window")]
    assert len(mixed) == 40
    assert 12 <= len(english) <= 14
    assert mixed == lessons("train", "into", "into", "from", count=40)


@pytest.mark.parametrize("named", [[], "into", ["int"], [["into"]], 3, None])
def test_bad_lessons_are_refused(named: object) -> None:
    with pytest.raises(DataError, match="expected a list of some of into, from, explain"):
        load_examples(Data(maker="libreoffice_help", options={"lessons": named}), "train", 9, 0)


def test_off_debian_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT_SERVE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=debian_package.FOLDER_VARIABLE):
        debian_package.unpacked_package("no-such-package", "usr/share/no-such-package")
    assert not list((tmp_path / "datasets").glob(".*.tmp"))


def test_package_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_command: list[str], folder: Path, _package: str) -> None:
        (folder / "half.deb").write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("ACT_SERVE_HOME", str(tmp_path))
    monkeypatch.setattr(debian_package, "_run", full)
    monkeypatch.setattr(debian_package.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(DataError, match=r"No space left on device.*ACT_SERVE_HOME"):
        debian_package.unpacked_package("no-such-package", "usr/share/no-such-package")
    assert not [path for path in (tmp_path / "datasets").iterdir() if path.suffix != ".lock"]


def test_package_with_a_home_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ACT_SERVE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="ACT_SERVE_HOME"):
        debian_package.unpacked_package("no-such-package", "usr/share/no-such-package")


@pytest.fixture
def handbook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / english_prose.HANDBOOK
    folder.mkdir(parents=True)
    paragraphs = [f"Chapter {chr(97 + n)} says " + "that packages are installed " * 6 + "with care." for n in range(9)]
    page = "".join(f'<div class="para">{text}</div>' for text in paragraphs)
    (folder / "index.html").write_text(page, encoding="utf-8")
    monkeypatch.setenv(debian_package.FOLDER_VARIABLE, str(tmp_path))


@pytest.mark.usefixtures("handbook")
def test_the_handbook_is_only_for_tests() -> None:
    data = Data(maker="debian_handbook")
    found = load_examples(data, "test", 99, 0)
    assert len(found) == 9
    assert load_examples(data, "test", 4, 0) == found[:4]
    task = Task(name="english", metric="nll", data=data)
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=r"^task english: debian_handbook is only for tests; give .* `train_data`"):
            task_examples(task, data, split, 1, 0)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_shipped_profile_has_text_to_retain(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {"libreoffice_help": lambda *_, **__: [Example("a", "b")]}  # the packages are not on every machine
    monkeypatch.setattr(catalogue, "MAKERS", catalogue.MAKERS | made_up)
    profile = load_profile(path)
    assert bool(retained_text(profile)) == (profile.finetune.retention is not None)


def test_jsonl_goes_round(tmp_path: Path) -> None:
    ends = "\u2028 \u2029 \x85 \x0b \r\n end"  # what str.splitlines takes for ends of lines
    examples = [Example("é?", "oui"), Example(None, "plain text"), Example(f"a{ends}", f"b{ends}", (f"b{ends}", "c"))]
    write_examples(tmp_path / "a.jsonl", examples)
    assert read_examples(tmp_path / "a.jsonl") == examples


def test_jsonl_with_the_ends_of_lines_of_other_systems(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r\n\r\n{"prompt": 1.5, "answer": 2, "choices": [2, 3]}')
    assert read_examples(tmp_path / "a.jsonl") == [Example(None, "one"), Example("1.5", "2", ("2", "3"))]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt": "x"}',
        "3",
        '{"text": " "}',
        '{"text": null}',
        '{"prompt": null, "answer": "x"}',
        '{"prompt": "x", "answer": null}',
        '{"prompt": "x", "answer": {"a": 1}}',
        '{"prompt": "x", "answer": true}',
        '{"prompt": "x", "answer": "b", "choices": "abc"}',
        '{"prompt": "x", "answer": "b", "choices": ["b", null]}',
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read_examples(tmp_path / "a.jsonl")


def test_unknown_maker_option_and_empty_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="known: libreoffice_help"):
        load_examples(Data(maker="nothing"), "train", 1, 0)
    with pytest.raises(DataError, match="no option colour"):
        load_examples(Data(maker="order_notes", options={"colour": 1}), "train", 1, 0)
    (tmp_path / "a.jsonl").write_text("")
    files = Data(train=str(tmp_path / "a.jsonl"), test=str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match=r"a\.jsonl holds no validation examples"):
        load_examples(files, "validation", 1, 0)
    task = Task(name="demo", metric="nll", data=Data(test=str(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match=r"^task demo: \S*a\.jsonl holds no test examples"):
        task_examples(task, task.data, "test", 1, 0)
    with pytest.raises(DataError, match=r"^task demo: the data names no `validation` or `train` file, .*; name one"):
        task_examples(task, task.data, "validation", 1, 0)


def test_of_files_the_first_lines_are_taken(tmp_path: Path) -> None:
    lines = [Example(None, f"line {number}") for number in range(9)]
    write_examples(tmp_path / "a.jsonl", lines)
    data = Data(test=str(tmp_path / "a.jsonl"))
    assert load_examples(data, "test", 4, 0) == load_examples(data, "test", 4, 1) == lines[:4]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_word_problem_is_solved_by_its_steps(split: Split) -> None:
    for language, marker in (("en", "Answer:"), ("fr", "Réponse :")):
        for example in word_problems(split, 200, 5, language=language):
            *steps, result = re.split(r"\. (?=[\dAR])", example.answer)
            numbers = [int(number) for number in re.findall(r"\d+", example.prompt or "")]
            for step in steps:
                left, right = step.split(" = ")
                assert eval(left) == int(right)  # the text is this module's own: digits and one sign
                numbers.append(int(right))
            assert result == f"{marker} {numbers[-1]}"


def test_both_languages_have_the_same_problems() -> None:
    pairs = zip(word_problems("test", 100, 0), word_problems("test", 100, 0, language="fr"), strict=True)
    assert all(answer_score("final_number", [fr.answer], [en.answer]) == 1.0 for en, fr in pairs)
    with pytest.raises(DataError, match="not in 'xx'"):
        word_problems("test", 1, 0, language="xx")


def _problem_pattern(text: str) -> re.Pattern[str]:
    """Finds a kind of problem, with its names and numbers as groups, whatever is said before and after it."""
    pattern = ""
    for place, part in enumerate(re.split(r"\{(\w+)\}", text)):
        group = f"(?P={part})" if f"(?P<{part}>" in pattern else rf"(?P<{part}>\w+)"
        pattern += group if place % 2 else re.escape(part)
    return re.compile(pattern)


KINDS = {
    language: [_problem_pattern(getattr(kind, language)) for kind in (*PROBLEMS, *UNSEEN_PROBLEMS)]
    for language in ("en", "fr")
}
GOODS = ("goods", "second")


def _contents(split: Split, language: str, count: int) -> list[tuple[int, tuple[str, ...]]]:
    """The kind of each problem, and its names and numbers, which both languages share."""
    prompts = [example.prompt or "" for example in word_problems(split, count, 0, language=language)]
    found = [
        (kind, tuple(matched[group] for group in sorted(matched.groupdict()) if group not in GOODS))
        for prompt in prompts
        for kind, pattern in enumerate(KINDS[language])
        if (matched := pattern.search(prompt))
    ]
    assert len(found) == count
    return found


def test_no_word_problem_of_one_split_is_in_another_in_either_language() -> None:
    seen: set[tuple[int, tuple[str, ...]]] = set()
    for split, count in (("train", 4000), ("validation", 1000), ("test", 1000)):
        contents = _contents(split, "en", count)
        assert contents == _contents(split, "fr", count)
        assert not seen & set(contents)
        seen.update(contents)
