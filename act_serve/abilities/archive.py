"""Unpacks an uploaded ability: only its known files, only within limits, never a link, never outside the folder."""

from __future__ import annotations

import gzip
import os
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from act_serve.delta.manifest import EVALUATION_FILE, MANIFEST_FILE, TENSORS_FILE
from act_serve.errors import ArchiveError, StoreError, TooLargeError

FILES = frozenset({MANIFEST_FILE, TENSORS_FILE, EVALUATION_FILE})
_MAX_JSON_BYTES = 16 * 2**20
_MAX_MEMBERS = 16
_HEADER_BYTES = 2**20  # of a zip's directory, or of all headers of a tar
_CHUNK_BYTES = 2**18
# Everything that the standard library's readers are known to raise on hostile bytes; OSError is sorted out below.
_UNREADABLE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, struct.error),
    *(EOFError, ValueError, OverflowError, NotImplementedError, RuntimeError, KeyError, IndexError),
)


@dataclass(frozen=True, slots=True)
class _Member:
    """One entry of an archive: a file of ``size`` bytes, or else what it is."""

    path: str
    size: int
    file: IO[bytes] | None
    other: str = ""


class _Metered:
    """A file that refuses to give more than was allowed: parsers read headers as large as the headers say.

    Args:
        file: seekable.
        allowed: bytes that may be read from now on; add to it.
    """

    def __init__(self, file: IO[bytes], allowed: int) -> None:
        self._file, self.allowed = file, allowed
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, lambda: None

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        data = b"" if size > max(self.allowed, _CHUNK_BYTES) else self._file.read(size if size >= 0 else _CHUNK_BYTES)
        self.allowed -= max(size, len(data))
        if self.allowed < 0:
            raise ArchiveError("the archive's headers are larger than any ability's; send its three files only")
        return data


def unpack(archive: IO[bytes], folder: Path, max_bytes: int) -> None:
    """Writes the files of a zip or tar.gz of an artifact folder into ``folder``, durably.

    They may lie at the archive's top or together in one folder. What is there already when it fails is for the caller
    to remove; nothing is ever written outside ``folder``.

    Args:
        archive: seekable, of any content.
        folder: exists and is empty.
        max_bytes: of all files together, uncompressed; looked at before a file is read and while it is.

    Raises:
        ArchiveError: it is not such an archive, or holds anything else than an ability's files.
        TooLargeError: the files are larger than ``max_bytes``.
        StoreError: the disk refuses.
    """
    places: dict[str, str] = {}
    count, room = 0, max_bytes
    try:
        for member in _members(archive):
            count += 1
            if count > _MAX_MEMBERS:
                raise ArchiveError(f"the archive has more than {_MAX_MEMBERS} entries; send an ability's files only")
            place, name = _place(member)
            if member.file is None:
                continue
            if name in places:
                raise ArchiveError(f"the archive holds {name} twice; which one is meant?")
            places[name] = place
            room = check_size(name, member.size, room)
            write_file(member.file, folder / name, member.size)
    except _UNREADABLE as exc:
        raise ArchiveError(f"the archive is damaged or cannot be read: {str(exc)[:200] or 'cut off'}") from exc
    except OSError as exc:  # the archive's own offsets lead nowhere
        raise ArchiveError(f"the archive is damaged: {exc.strerror or exc}") from exc
    if len(set(places.values())) > 1:
        raise ArchiveError("the archive's files lie in several folders; send one ability at a time")
    if missing := {MANIFEST_FILE, TENSORS_FILE} - places.keys():
        raise ArchiveError(f"the archive holds no {' and no '.join(sorted(missing))}; send an ability's folder")


def check_size(name: str, size: int, room: int) -> int:
    """The room that is left after a file of this size.

    Raises:
        TooLargeError: there is not enough.
    """
    limit = room if name == TENSORS_FILE else min(room, _MAX_JSON_BYTES)
    if size > limit:
        raise TooLargeError(f"{name} has {size} bytes, and {limit} are left of what this server takes for it")
    return room - size


def write_file(source: IO[bytes], target: Path, size: int) -> None:
    """Copies exactly ``size`` bytes into a new file, durably.

    Raises:
        ArchiveError: there are fewer or more.
        StoreError: the disk refuses.
    """
    left = size
    try:
        with target.open("xb") as file:
            while left >= 0 and (chunk := _read(source, min(_CHUNK_BYTES, left + 1), target.name)):
                left -= len(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        raise StoreError(f"{target.name} cannot be written: {exc.strerror}; nothing was added") from exc
    if left:
        raise ArchiveError(f"{target.name} is {'longer' if left < 0 else 'shorter'} than announced; send it again")


def _read(source: IO[bytes], size: int, name: str) -> bytes:
    try:
        return source.read(size)
    except OSError as exc:
        raise ArchiveError(f"{name} cannot be read: {exc.strerror or exc}") from exc


def _place(member: _Member) -> tuple[str, str]:
    """The folder and the name of an entry, both checked."""
    path = member.path
    shown = ascii(path[:80])
    if path.startswith("/") or "\\" in path or ":" in path or "\0" in path or ".." in path.split("/"):
        raise ArchiveError(f"the archive's entry {shown} leads out of the archive; pack the folder with plain names")
    parts = PurePosixPath(path).parts
    if member.other == "folder":
        if len(parts) > 1:
            raise ArchiveError(f"the archive's folder {shown} is no part of an ability")
        return "", ""
    if member.other:
        raise ArchiveError(f"the archive's entry {shown} is {member.other}; only plain files are accepted")
    if len(parts) not in (1, 2) or parts[-1] not in FILES:
        raise ArchiveError(f"the archive's entry {shown} is not one of {', '.join(sorted(FILES))}")
    return "/".join(parts[:-1]), parts[-1]


def _members(archive: IO[bytes]) -> Iterator[_Member]:
    archive.seek(0)
    magic = archive.read(4)
    archive.seek(0)
    if magic.startswith(b"PK"):
        return _zip_members(archive)
    if magic.startswith(b"\x1f\x8b"):
        return _tar_members(archive)
    raise ArchiveError("this is neither a zip nor a tar.gz; pack the ability's folder as one of them")


def _zip_members(archive: IO[bytes]) -> Iterator[_Member]:
    metered = _Metered(archive, _HEADER_BYTES)
    with zipfile.ZipFile(cast(Any, metered)) as opened:
        metered.allowed = sys.maxsize  # from here on it is read in chunks
        for info in opened.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                yield _Member(info.filename, 0, None, "folder")
            elif kind not in (0, stat.S_IFREG):
                yield _Member(info.filename, 0, None, "a link" if kind == stat.S_IFLNK else "a device")
            elif info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                yield _Member(info.filename, 0, None, "encrypted or packed in an unusual way")
            else:
                with opened.open(info) as file:
                    yield _Member(info.filename, info.file_size, file)


def _tar_members(archive: IO[bytes]) -> Iterator[_Member]:
    with gzip.GzipFile(fileobj=archive, mode="rb") as plain:  # a form's file is open for writing, too
        metered = _Metered(cast(IO[bytes], plain), _HEADER_BYTES)
        with tarfile.open(fileobj=cast(Any, metered), mode="r:") as opened:
            for info in opened:
                if info.isdir():
                    yield _Member(info.name, 0, None, "folder")
                elif info.islnk() or info.issym():
                    yield _Member(info.name, 0, None, "a link")
                elif not info.isreg() or info.issparse():
                    yield _Member(info.name, 0, None, "a device or a sparse file")
                else:
                    metered.allowed += max(info.size, 0)
                    yield _Member(info.name, info.size, opened.extractfile(info))
