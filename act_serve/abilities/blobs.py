"""Files by their sha256, on a disk with a limit; several processes may use the same folder."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from act_serve.errors import ArtifactDamagedError, StoreError

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
# How long another process may take over a download that this one needs, too.
_WAIT_S = 600.0


class Blobs:
    """A folder of files named after their content.

    Args:
        folder: need not exist yet; on the same disk as the places that files are linked to.
        max_bytes: of all files together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self._max_bytes = folder, max_bytes

    def link(self, sha256: str, target: Path, download: Callable[[Path], None], what: str) -> None:
        """Makes ``target`` a name of the file with this content, downloading and checking it where it is not here yet.

        Raises:
            ArtifactDamagedError: what was downloaded has another content; it is not kept.
            StoreError: the disk refuses, or whatever ``download`` raises.
        """
        from filelock import FileLock, Timeout

        blob = self.folder / sha256
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{sha256}.lock", timeout=_WAIT_S):
                if not blob.exists():
                    self._download(sha256, blob, download, what)
                os.utime(blob)
                if not target.exists():
                    os.link(blob, target)
        except Timeout:
            raise StoreError(f"{what} is being downloaded by another process for {_WAIT_S:g} s; try again") from None
        except OSError as exc:
            raise StoreError(f"{what} cannot be kept in {self.folder}: {exc.strerror or exc}") from exc

    def adopt(self, sha256: str, path: Path) -> None:
        """Keeps a local file that is known to have this content, where the disk allows."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.link(path, self.folder / sha256)
        except OSError:  # it is there already, or will be downloaded
            return

    def evict(self, links: Iterable[Path], keep: Iterable[Path]) -> None:
        """Removes the files that were used longest ago, with their names among ``links``, until the limit is met.

        Args:
            links: all places that files may be linked to.
            keep: those whose files stay, whatever the limit says.
        """
        kept = {node for path in keep if (node := _node(path))}
        names: dict[int, list[Path]] = {}
        for path in links:
            if node := _node(path):
                names.setdefault(node, []).append(path)
        stats = {}
        for path in self.folder.glob("*"):
            if path.suffix == "":
                try:
                    stats[path] = path.stat()
                except FileNotFoundError:  # another process evicts, too
                    continue
        total = sum(stat.st_size for stat in stats.values())
        for blob, stat in sorted(stats.items(), key=lambda item: item[1].st_mtime):
            if total <= self._max_bytes:
                return
            if stat.st_ino not in kept:
                for path in (*names.get(stat.st_ino, ()), blob, blob.with_suffix(".lock")):
                    path.unlink(missing_ok=True)
                total -= stat.st_size
        if total > self._max_bytes:
            _log.warning("the active abilities have %d bytes, more than the cache's limit %d", total, self._max_bytes)

    def _download(self, sha256: str, blob: Path, download: Callable[[Path], None], what: str) -> None:
        handle, name = tempfile.mkstemp(prefix=f"{sha256}.", suffix=".part", dir=self.folder)
        os.close(handle)
        staged = Path(name)
        try:
            download(staged)
            if _sha256(staged) != sha256:
                raise ArtifactDamagedError(
                    f"{what}: its tensors in the store have another sha256 than its manifest says; nothing of them was "
                    "kept: restore or publish it again"
                )
            staged.replace(blob)
        finally:
            staged.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _node(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
