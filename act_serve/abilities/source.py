"""Copies an ability from a place on this machine that the operator has allowed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from act_serve.abilities.archive import FILES, check_size, unpack, write_file
from act_serve.errors import ArchiveError


def fetch(source: str, allowed: Sequence[Path], folder: Path, max_bytes: int) -> None:
    """Writes the files of an ability into ``folder``.

    Args:
        source: an absolute path, or a ``file://`` URI, of an artifact folder or of a zip or tar.gz of one.
        allowed: folders that it may lie under; links are followed first, so none leads out.
        folder: exists and is empty.
        max_bytes: of all files together.

    Raises:
        ArchiveError: it is of another kind, lies elsewhere or holds no ability; whatever :func:`unpack` raises.
    """
    path = _checked(source, allowed)
    if not path.is_dir():
        with _plain_file(path) as file:
            unpack(file, folder, max_bytes)
        return
    room = max_bytes
    for name in sorted(FILES & set(os.listdir(path))):
        with _plain_file(path / name) as file:
            size = os.fstat(file.fileno()).st_size
            room = check_size(name, size, room)
            write_file(file, folder / name, size)


def _checked(source: str, allowed: Sequence[Path]) -> Path:
    """The real path; says nothing about what lies outside the allowed folders."""
    try:
        parts = urlsplit(source)
        if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise ArchiveError(
                f"abilities are fetched from no {source[:80]!a}: give an absolute path or a file:// URI under one "
                "of allowed_sources, or upload an archive",
                param="source",
            )
        path = Path(unquote(parts.path) if parts.scheme else source)
        real = path.resolve()
        inside = path.is_absolute() and any(real.is_relative_to(root.resolve()) for root in allowed)
    except (ValueError, OSError, RuntimeError) as exc:
        raise ArchiveError(f"{source[:80]!a} is not a path: {exc}", param="source") from exc
    if not inside:
        raise ArchiveError(
            f"{source[:80]!a} does not lie under a folder of the server's setting allowed_sources", param="source"
        )
    return real


@contextmanager
def _plain_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that is no link, device or pipe."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as exc:
        raise ArchiveError(f"{path.name} cannot be read: {exc.strerror}", param="source") from exc
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ArchiveError(f"{path.name} is not a plain file", param="source")
        yield file
