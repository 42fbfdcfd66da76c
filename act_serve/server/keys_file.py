"""The file of API keys: YAML (or JSON) with one entry per key, as ``act-serve key new`` prints it.

It holds the keys' sha256, never a key. A fast hash is enough because keys are 256 random bits, which nobody can try
one by one; slow, salted hashes are for passwords that people choose, and would cost milliseconds per request.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from act_serve.delta.composition import NAME_PATTERN
from act_serve.errors import ProfileError
from act_serve.profile.yaml_text import RepeatedKeyError, parse_yaml

_MAX_FILE_BYTES = 1 << 20

Role = Literal["infer", "admin"]


class KeyRecord(BaseModel):
    """One entry of a keys file.

    Attributes:
        id: what logs and messages call the key.
        sha256: of the key, in hexadecimal.
        roles: ``infer`` asks the model, ``admin`` changes what is served; neither includes the other.
        abilities: names that the key may use; without the field it may use all, with an empty list only the base.
        requests_per_minute: how fast the key's allowance fills up again, per router; without it there is no limit.
        burst: the most requests at once; by default those of one minute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    roles: Annotated[frozenset[Role], Field(min_length=1)]
    abilities: frozenset[Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$")]] | None = None
    requests_per_minute: Annotated[float, Field(ge=0.001, le=1e6)] | None = None
    burst: Annotated[int, Field(ge=1)] | None = None

    @field_validator("abilities", "requests_per_minute", "burst", mode="before")
    @classmethod
    def _said(cls, value: object) -> object:
        if value is None:  # "abilities:" with nothing behind it must not mean all of them
            raise ValueError("is empty; give a value or leave the field out")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.burst is not None and self.requests_per_minute is None:
            raise ValueError("burst needs requests_per_minute")
        return self


def new_key() -> tuple[str, str]:
    """A random key of 256 bits, and its sha256 in hexadecimal."""
    key = f"act-{secrets.token_urlsafe(32)}"
    return key, hashlib.sha256(key.encode()).hexdigest()


def read_keys_file(path: Path) -> list[KeyRecord]:
    """Reads and checks a keys file; no message repeats a value that stands in it.

    Raises:
        ProfileError: it cannot be read, or as :func:`parse_keys`.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
        if len(raw) > _MAX_FILE_BYTES:
            raise ProfileError(f"{path}: a keys file has at most {_MAX_FILE_BYTES} bytes")
        content, _ = parse_yaml(raw)
    except OSError as exc:
        raise ProfileError(f"{path}: the keys file cannot be read ({exc.strerror})") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # their texts quote the file
        mark = getattr(exc, "problem_mark", None)
        twice = isinstance(exc, RepeatedKeyError)
        said = "a field stands twice in one entry" if twice else "the keys file is not valid YAML"
        raise ProfileError(f"{path}{f':{mark.line + 1}' if mark else ''}: {said}") from None
    return parse_keys(content, str(path))


def parse_keys(content: object, what: str) -> list[KeyRecord]:
    """Checks the entries of a keys file.

    Args:
        content: of the file, parsed.
        what: its name in messages.

    Raises:
        ProfileError: it is not a list of entries, or two entries are of one id or one key.
    """
    if not isinstance(content, list) or not content:
        raise ProfileError(f"{what}: a keys file is a list with an entry for each key; act-serve key new prints one")
    try:
        records = TypeAdapter(list[KeyRecord]).validate_python(content)
    except ValidationError as exc:
        first = exc.errors(include_input=False)[0]
        entry, *fields = first["loc"]
        # An unknown field could be a key in the wrong place, so not all of it is shown.
        named = "".join(f", {str(field)[:20]}" for field in fields)
        raise ProfileError(
            f"{what}: entry {int(entry) + 1}{named}: {first['msg'].removeprefix('Value error, ')}"
        ) from None
    for field in ("id", "sha256"):
        if len({getattr(record, field) for record in records}) < len(records):
            raise ProfileError(f"{what}: two entries have the same {field}; every key has its own")
    return records
