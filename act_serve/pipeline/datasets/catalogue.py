"""Finds the examples that a profile's `data` section names."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from act_serve.errors import DataError
from act_serve.models.examples import Example
from act_serve.pipeline.datasets.english_prose import debian_handbook, python_reference
from act_serve.pipeline.datasets.general_ability import general_ability
from act_serve.pipeline.datasets.gsm8k import gsm8k
from act_serve.pipeline.datasets.libreoffice_help import language_lessons
from act_serve.pipeline.datasets.order_notes import order_notes
from act_serve.pipeline.datasets.splits import Split, split_of
from act_serve.pipeline.datasets.word_problems import word_problems
from act_serve.profile.schema import Data, Task

MAKERS: dict[str, Callable[..., list[Example]]] = {
    "libreoffice_help": language_lessons,
    "order_notes": order_notes,
    "word_problems": word_problems,
    "general_ability": general_ability,
    "gsm8k": gsm8k,
    "python_reference": python_reference,
    "debian_handbook": debian_handbook,
}
OPTIONS = {
    "libreoffice_help": {"language", "lessons"},
    "order_notes": {"keys"},
    "word_problems": {"language"},
    "general_ability": {"suite"},
}


def load_examples(data: Data, split: Split, count: int, seed: int) -> list[Example]:
    """Returns up to `count` examples of one split: of files the first lines, whatever the seed; makers draw by it.

    Raises DataError when the data is missing or malformed, or when nothing is left.
    """
    if data.maker is None:
        return _from_files(data, split)[:count]
    found = _maker(data.maker)(split, count, seed, **_checked(data))
    if not found:
        raise DataError(f"the data maker {data.maker} has no {split} examples; name another one, or files")
    return found


def task_examples(task: Task, data: Data, split: Split, count: int, seed: int) -> list[Example]:
    """As `load_examples`, from one of a task's data sections: errors name the task."""
    try:
        return load_examples(data, split, count, seed)
    except DataError as exc:
        raise DataError(f"task {task.name}: {exc}") from exc


def read_examples(path: Path) -> list[Example]:
    """Reads a JSONL file of `{"prompt", "answer"}` or `{"text"}` objects; raises DataError with the line.

    Values are text, or numbers, which are read as text. Beside prompt and answer there may be `choices`, a list that
    has the answer in it.
    """
    try:
        # JSON text may hold what str.splitlines takes for ends of lines, such as U+2028; reading made them all \n.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: can't be read ({exc})") from exc
    return [_example(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Writes examples as JSONL, as `read_examples` reads them."""
    lines = [json.dumps(_line(example), ensure_ascii=False) + "\n" for example in examples]
    path.write_text("".join(lines), encoding="utf-8")


def examples_hash(examples: Iterable[Example]) -> str:
    """A sha256 over the examples, for manifests and stage records."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.prompt, example.answer, *example.choices]).encode())
    return digest.hexdigest()


def _maker(name: str) -> Callable[..., list[Example]]:
    if name not in MAKERS:
        raise DataError(f"no data maker is called {name!r}; known: {', '.join(MAKERS)}")
    return MAKERS[name]


def _checked(data: Data) -> dict[str, Any]:
    unknown = set(data.options) - OPTIONS.get(data.maker or "", set())
    if unknown:
        raise DataError(f"the data maker {data.maker} has no option {', '.join(sorted(unknown))}")
    return data.options


def _from_files(data: Data, split: Split) -> list[Example]:
    held_out = data.validation is None and split != "test"
    named = data.train if held_out else getattr(data, split)
    if named is None:
        files = "`validation` or `train`" if split == "validation" else f"`{split}`"
        raise DataError(
            f"the data names no {files} file, and this build needs {split} examples; name one beside `test`"
        )
    found = read_examples(Path(named))
    if not found:
        raise DataError(f"{named} holds no {split} examples; it has no line but empty ones")
    part = _held_out(found, split) if held_out else found
    if not part:
        raise DataError(
            f"the {len(found)} lines of {named} leave none for validation, for which 5 % of them are held out; name a "
            "`validation` file, or give more lines"
        )
    return part


def _held_out(examples: list[Example], split: Split) -> list[Example]:
    """The lines that their hash holds out of the training file for validation, or the others."""
    part = {example: split_of(example.prompt or example.answer) == "validation" for example in examples}
    if split == "validation":
        return [example for example in examples if part[example]]
    return [example for example in examples if not part[example]] or examples


def _line(example: Example) -> dict[str, Any]:
    if example.prompt is None:
        return {"text": example.answer}
    choices = {"choices": example.choices} if example.choices else {}
    return {"prompt": example.prompt, "answer": example.answer, **choices}


def _example(path: Path, number: int, line: str) -> Example:
    try:
        content = json.loads(line)
        if "text" in content:
            text = _text("text", content["text"])
            if not text.strip():
                raise ValueError("the text is empty")
            return Example(None, text)
        prompt, answer = (_text(key, content[key]) for key in ("prompt", "answer"))
        choices = _choices(content.get("choices", []))
        if choices and answer not in choices:
            raise ValueError("the answer is none of the choices")
        return Example(prompt, answer, choices)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise DataError(f'{path}:{number}: expected {{"prompt", "answer"}} or {{"text"}}: {exc!r}') from exc


def _choices(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list):
        raise ValueError(f"`choices` is {json.dumps(found)} and no list")
    return tuple(_text("choices", each) for each in found)


def _text(key: str, found: Any) -> str:
    """Text as it is, and numbers as Python writes them; its words for null, true and objects would be nobody's text."""
    if isinstance(found, bool) or not isinstance(found, (str, int, float)):
        raise ValueError(f"`{key}` has {json.dumps(found)}, which is neither text nor a number")
    return str(found)
