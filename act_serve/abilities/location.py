"""Where a store lies: a folder, or the URL of an object store; a URL's secrets are in nothing that is printed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from act_serve.errors import StoreError

_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://(?:(?P<user>[^/@]*)@)?(?P<path>[^?#]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Location:
    """A parsed URL of a store.

    Attributes:
        shown: the URL without user and password, for messages, logs and the name of the cache.
        protocol: fsspec's name of the file system, such as ``s3`` or ``memory``.
        opened: what fsspec is given.
        options: what it is given beside that.
        secrets: the words that no message may hold.
    """

    shown: str
    protocol: str
    opened: str = field(repr=False)
    options: dict[str, str] = field(repr=False, default_factory=dict)
    secrets: tuple[str, ...] = field(repr=False, default=())

    def redacted(self, text: str) -> str:
        """The text without the URL's secrets."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def is_url(place: str | Path) -> bool:
    """Whether this names a store by URL; ``file://`` is one, too."""
    return isinstance(place, str) and "://" in place


def absolute(place: str | Path) -> str:
    """The same place for a process with another working folder."""
    return str(place) if is_url(place) else str(Path(place).absolute())


def shown(place: str | Path) -> str:
    """The place as it may be printed and logged."""
    return parse_url(str(place)).shown if is_url(place) else str(place)


def parse_url(url: str) -> Location:
    """Reads ``protocol://[user:password@]place/prefix``.

    For S3 user and password are the key's id and the key; better than both is the environment (docs/control-plane.md).

    Raises:
        StoreError: it has another form, or a prefix that leads out of where it begins.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise StoreError(
            "the store's URL is malformed; write it as s3://BUCKET/PREFIX, without ? or #, which options it needs go "
            "into the environment"
        )
    protocol, user, path = match["protocol"], match["user"], match["path"].rstrip("/")
    parts = path.split("/") if protocol != "file" else path.split("/")[1:]
    # An empty part is a name of its own in object stores, and '..' is one nowhere else.
    if any(part in ("", ".", "..") or unquote(part) in (".", "..") or set(part) & set("\\*[]") for part in parts):
        raise StoreError(
            f"the store's URL {protocol}://{path[:200]} has an empty, '.' or '..' part, or one of \\*[]; write "
            "protocol://PLACE/PREFIX"
        )
    options: dict[str, str] = {}
    secrets: tuple[str, ...] = ()
    login = ""
    if user:
        name, _, password = user.partition(":")
        secrets = tuple(sorted({each for each in (password, unquote(password), user) if each}, key=len, reverse=True))
        if protocol in ("s3", "s3a"):  # s3fs would take them for a part of the bucket's name
            options = {"key": unquote(name), "secret": unquote(password)}
        else:
            login = f"{user}@"
    return Location(f"{protocol}://{path}", protocol, f"{protocol}://{login}{path}", options, secrets)


def cache_limit(variable: str = "ACT_SERVE_STORE_CACHE_BYTES", default: int = 20_000_000_000) -> int:
    """Bytes of tensors that this machine keeps of one store.

    Raises:
        StoreError: the variable is not a number of bytes.
    """
    text = os.environ.get(variable, "")
    if text and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise StoreError(f"{variable}={text[:40]!a} is not a number of bytes; write for example {default}")
    return int(text or default)
