"""Reads a profile file and says exactly what is wrong with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from act_serve.errors import ProfileError
from act_serve.profile.schema import Data, Profile
from act_serve.profile.yaml_text import parse_yaml

Place = tuple[str, ...]


def load_profile(path: Path) -> Profile:
    """Returns the profile in `path`, its data files resolved against the profile's folder.

    Raises ProfileError with file, line, field and what is expected there.
    """
    content, lines = _read(path, ())
    try:
        profile = Profile.model_validate(content)
    except ValidationError as exc:
        raise ProfileError(explain(exc, f"{path}:1", lines, "profile")) from exc
    return _with_absolute_files(profile, path.parent)


def _read(path: Path, below: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Place, str]]:
    """The keys of a profile and of those that it extends, and `file:line` of every key; `below` extend this one."""
    content, lines = read_mapping(path, "profile", "name")
    if (name := content.pop("extends", None)) is None:
        return content, lines
    where = lines["extends",]
    if not isinstance(name, str) or Path(name).name != name:
        raise ProfileError(f"{where}: extends: give the name of a profile in the same folder, such as fr.yaml")
    if path.with_name(name) in (path, *below):
        raise ProfileError(f"{where}: extends: {name} extends this profile in turn")
    inherited, places = _read(path.with_name(name), (path, *below))
    merged = {key: value for key, value in {**inherited, **content}.items() if value is not None}
    return merged, {place: at for place, at in places.items() if place[:1] not in lines} | lines


def read_mapping(path: Path, what: str, first: str) -> tuple[dict[str, Any], dict[Place, str]]:
    """The keys of a YAML file, and `file:line` of every key; the file is a `what` and begins with the key `first`.

    Raises ProfileError when it can't be read or is no mapping, or has a key twice in one place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ProfileError(f"{path}: can't be read ({exc})") from exc
    try:
        content, root = parse_yaml(text)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ProfileError(f"{where}: not valid YAML: {getattr(exc, 'problem', exc)}") from exc
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: a {what} is a mapping that starts with `{first}: ...`")
    return content, {place: f"{path}:{line}" for place, line in _lines(root, ())}


def _lines(node: Any, place: Place) -> list[tuple[Place, int]]:
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


def explain(error: ValidationError, where: str, lines: Mapping[Place, str], what: str) -> str:
    """One line per mistake: its place in `lines`, or `where` none is known, the key, and what is expected there.

    `what` names the whole, for mistakes of no single key.
    """
    said = []
    for problem in error.errors():
        place = tuple(str(part) for part in problem["loc"])
        known = next((place[:length] for length in range(len(place), 0, -1) if place[:length] in lines), ())
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key; check its spelling and indentation"
        elif problem["type"] == "too_short":
            message = "give at least one"
        said.append(f"{lines.get(known, where)}: {'.'.join(place) or what}: {message}")
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
