"""The few things that a store asks of an object store, through fsspec; failures are StoreErrors without secrets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from act_serve.abilities.location import Location
from act_serve.errors import ActServeError, MissingExtraError, StoreError


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One listed object; ``signature`` differs when its content may."""

    size: int
    signature: str


class Remote:
    """Objects under a URL, by keys relative to it. Opens nothing before it is first asked.

    Every method raises StoreError where the object store cannot be reached or refuses.

    Args:
        location: of the store.
    """

    def __init__(self, location: Location) -> None:
        self.location = location

    def find(self) -> dict[str, RemoteFile]:
        """All objects, by key, with as few requests as the object store allows (S3: one per 1,000 objects)."""
        files, root = self._opened
        with self._asking("list"):
            files.invalidate_cache()
            try:
                listed = files.find(root, detail=True)
            except FileNotFoundError:
                # A prefix without objects is an empty list there; this is a bucket that does not exist.
                if self.location.protocol in ("s3", "s3a"):
                    raise
                return {}
        start = len(root.rstrip("/")) + 1
        return {path[start:]: _described(info) for path, info in listed.items()}

    def read(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The content of small objects, asked for at the same time; those that are gone by now are left out."""
        if not keys:
            return {}
        files, root = self._opened
        with self._asking("read"):
            found = files.cat([f"{root}/{key}" for key in keys], on_error="return")
            for data in found.values():
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise data
        start = len(root) + 1
        return {path[start:]: data for path, data in found.items() if isinstance(data, bytes)}

    def download(self, key: str, path: Path) -> None:
        """Writes an object into a local file."""
        files, root = self._opened
        with self._asking("read"):
            files.get_file(f"{root}/{key}", str(path))

    def upload(self, path: Path, key: str) -> None:
        """Makes a local file an object."""
        files, root = self._opened
        with self._asking("write"):
            files.put_file(str(path), f"{root}/{key}")

    def write(self, key: str, data: bytes) -> None:
        """Makes or replaces a small object."""
        files, root = self._opened
        with self._asking("write"):
            files.pipe_file(f"{root}/{key}", data)

    def create(self, key: str, data: bytes) -> bool:
        """Makes a small object; False, and nothing done, where it is there already, whoever was faster."""
        files, root = self._opened
        with self._asking("write"):
            try:
                files.pipe_file(f"{root}/{key}", data, mode="create")
            except FileExistsError:
                return False
        return True

    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is gone already."""
        files, root = self._opened
        with self._asking("write"):
            try:
                files.rm_file(f"{root}/{key}")
            except FileNotFoundError:
                return

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        with self._asking("open"):
            try:
                import fsspec
                from fsspec.core import url_to_fs

                options: dict[str, Any] = dict(self.location.options)
                if self.location.protocol in ("s3", "s3a"):  # s3fs tries again itself; botocore would for seconds
                    options["config_kwargs"] = {"retries": {"max_attempts": 1, "mode": "standard"}}
                files, root = url_to_fs(self.location.opened, **options)
            except ImportError as exc:
                if self.location.protocol in ("s3", "s3a"):
                    raise MissingExtraError("s3fs", "s3") from exc
                raise StoreError(f"fsspec {fsspec.__version__} cannot open {self.location.shown}: {exc}") from exc
        return files, root

    @contextmanager
    def _asking(self, verb: str) -> Iterator[None]:
        try:
            yield
        except ActServeError:
            raise
        # Each of fsspec's many file systems has errors of its own (botocore's, aiohttp's, ...), without a common base.
        except Exception as exc:
            said = self.location.redacted(f"{type(exc).__name__}: {exc}")
            # A cause is printed with a traceback, and may repeat what it was given.
            raise StoreError(f"cannot {verb} the ability store {self.location.shown} ({said[:300]})") from (
                None if self.location.secrets else exc
            )


def _described(info: dict[str, Any]) -> RemoteFile:
    marks = [info.get(name) for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created", "ino")]
    size = int(info.get("size") or 0)
    return RemoteFile(size, " ".join([str(size), *(str(mark) for mark in marks if mark is not None)]))
