"""Reads a profile file and says exactly what is wrong with it."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from act_serve.errors import ProfileError
from act_serve.profile.schema import Data, Profile


def load_profile(path: Path) -> Profile:
    """Returns the profile in `path`, its data files resolved against the profile's folder.

    Raises ProfileError with file, line, field and what is expected there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ProfileError(f"{path}: can't be read ({exc})") from exc
    content, lines = _parse(path, text)
    try:
        profile = Profile.model_validate(content)
    except ValidationError as exc:
        raise ProfileError(_explain(path, exc, lines)) from exc
    return _with_absolute_files(profile, path.parent)


def _parse(path: Path, text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    try:
        content = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ProfileError(f"{where}: not valid YAML: {getattr(exc, 'problem', exc)}") from exc
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: a profile is a mapping that starts with `name: ...`")
    return content, dict(_lines(root, ()))


def _lines(node: Any, place: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    """Lists the line of every key, by its place in the file."""
    found = [(place, node.start_mark.line + 1)]
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = _lines(value, (*place, str(key.value)))
            found += [((*place, str(key.value)), key.start_mark.line + 1), *below[1:]]
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found += _lines(value, (*place, str(index)))
    return found


def _explain(path: Path, error: ValidationError, lines: dict[tuple[str, ...], int]) -> str:
    said = []
    for problem in error.errors():
        place = tuple(str(part) for part in problem["loc"])
        known = next((place[:length] for length in range(len(place), 0, -1) if place[:length] in lines), ())
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key; check its spelling and indentation"
        said.append(f"{path}:{lines.get(known, 1)}: {'.'.join(place) or 'profile'}: {message}")
    return "\n".join(said)


def _with_absolute_files(profile: Profile, folder: Path) -> Profile:
    def absolute(data: Data) -> Data:
        named = {
            key: str((folder / value).resolve())
            for key in ("train", "validation", "test")
            if (value := getattr(data, key))
        }
        return data.model_copy(update=named)

    score = tuple(task.model_copy(update={"data": absolute(task.data)}) for task in profile.score)
    retain = tuple(
        task.model_copy(
            update={
                "data": absolute(task.data),
                "train_data": absolute(task.train_data) if task.train_data else None,
            }
        )
        for task in profile.retain
    )
    return profile.model_copy(update={"data": absolute(profile.data), "score": score, "retain": retain})
