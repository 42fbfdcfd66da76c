"""The local folder that stands for a store in an object store; it is only ever what the object store holds.

Manifests and the desired state are copied by :meth:`Mirror.pull`; tensors come when they are first used, because an
engine uses few of a large store's abilities and each costs one download, before its first request and not in a step.
Changes go to the object store first and come back with a pull. The folder may be shared by several processes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from act_serve.abilities.blobs import Blobs
from act_serve.abilities.desired_state import STATE_FILE, DesiredState, read_state
from act_serve.abilities.remote import Remote, RemoteFile
from act_serve.delta.composition import NAME_PATTERN
from act_serve.delta.manifest import EVALUATION_FILE, MANIFEST_FILE, TENSORS_FILE, read_manifest
from act_serve.errors import ArtifactDamagedError, ExistsError, StoreError

_log = logging.getLogger(__name__)
_FILES = "|".join(map(re.escape, (MANIFEST_FILE, TENSORS_FILE, EVALUATION_FILE)))
# Nothing else of the object store is looked at, so that no key of it can name another place on this disk.
_KEY = re.compile(rf"(?:{NAME_PATTERN}/[1-9][0-9]{{0,8}}/(?:{_FILES})|{re.escape(STATE_FILE)})")
_INDEX_FILE, _BLOBS, _LOCK_FILE = ".index.json", ".blobs", ".mirror.lock"
_REMOTE_LOCK = ".state.lock"
# Longer than an upload takes; a lock that is older was left by a process that died.
_LEASE_S = 900.0
_WAIT_S = 60.0
_POLL_S = 0.25
# What readers that do not watch the store, such as engines, may be behind it.
_FRESH_S = 1.0


class Mirror:
    """A copy of an object store in ``root``.

    Args:
        remote: the object store.
        root: belongs to this store alone; need not exist yet.
        max_bytes: of tensors that are kept; those of active versions are, whatever it says.
    """

    def __init__(self, remote: Remote, root: Path, max_bytes: int) -> None:
        self.remote, self.root = remote, root
        self._blobs = Blobs(root / _BLOBS, max_bytes)
        self._looked: float | None = None
        self._failing_since: float | None = None
        self._following = threading.Lock()

    @property
    def stale_s(self) -> float | None:
        """For how many seconds the object store could not be read; None while it can be."""
        return None if self._failing_since is None else time.monotonic() - self._failing_since

    def refresh(self, max_age_s: float = 0.0) -> None:
        """Pulls; where that fails, what is here already stays in service and the log says so once.

        Raises:
            StoreError: it fails, and nothing was ever pulled.
        """
        try:
            self.pull(max_age_s)
        except StoreError as exc:
            self._looked = time.monotonic()
            first = self._failing_since is None
            self._failing_since = self._failing_since or time.monotonic()
            if not (self.root / _INDEX_FILE).exists():
                raise
            if first:
                _log.warning("%s; serving what is cached of it", exc)

    def follow(self) -> None:
        """For readers: pulls at the first call; later ones return at once, and a thread pulls where it is time."""
        if self._looked is None:
            self.refresh(_FRESH_S)
        elif time.monotonic() - self._looked > _FRESH_S and self._following.acquire(blocking=False):
            threading.Thread(target=self._follow, name="store-mirror", daemon=True).start()

    def _follow(self) -> None:
        try:
            self.refresh(_FRESH_S)
        except StoreError:  # logged, and there is nobody here to tell
            return
        finally:
            self._following.release()

    def pull(self, max_age_s: float = 0.0) -> None:
        """Lists the object store and reads the manifests and the state that are new or changed.

        Args:
            max_age_s: how old the result of another pull, of any process, may be.

        Raises:
            StoreError: the object store or the disk refuses; nothing changed, or only what is new came.
        """
        with self._locked():
            if self._age_s() > max_age_s:
                index = self._index()
                found = self._find()
                changed = [key for key, file in found.items() if _copied(key) and index.get(key) != file]
                if STATE_FILE in changed:
                    # Read before what it names is listed, so that it never names what is not here.
                    self._copy([STATE_FILE], found)
                    state = found[STATE_FILE]
                    found = {**self._find(), STATE_FILE: state}
                    changed = [key for key, file in found.items() if _copied(key) and index.get(key) != file]
                self._copy([key for key in changed if key != STATE_FILE], found)
                self._remove(index.keys() - found.keys())
                self._write_index(found)
            self._looked = time.monotonic()
        if self._failing_since is not None:
            _log.warning("the ability store %s can be read again", self.remote.location.shown)
            self._failing_since = None

    def fetch(self, name: str, version: int) -> Path:
        """The folder of a version with its tensors in it.

        Raises:
            ArtifactDamagedError: the object store holds other tensors than the manifest says.
            StoreError: they are not here, and the object store cannot be read, or the disk not be written.
        """
        folder, what = self.root / name / str(version), f"ability {name}@{version}"
        target = folder / TENSORS_FILE
        try:
            os.utime(target)  # the oldest are evicted
            return folder
        except OSError:  # not here, or evicted
            pass
        if not (folder / MANIFEST_FILE).is_file():
            self.refresh()
        manifest = read_manifest(folder, what)
        key = f"{name}/{version}/{TENSORS_FILE}"
        listed = self._index()
        if key not in listed or listed[key].size != manifest.counts.bytes:
            there = f"{listed[key].size} bytes" if key in listed else "nothing"
            raise ArtifactDamagedError(
                f"{what}: the store has {there} where its manifest says {manifest.counts.bytes} bytes of tensors; "
                "restore or publish it again"
            )
        evaluation = f"{name}/{version}/{EVALUATION_FILE}"
        try:
            if evaluation in listed and not (folder / EVALUATION_FILE).exists():
                self._copy([evaluation], listed)
            self._blobs.link(manifest.tensors_sha256, target, lambda path: self.remote.download(key, path), what)
            self._evict(listed, target)
        except OSError as exc:
            raise self._unwritable(exc) from exc
        return folder

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While it is open, nobody else changes the object store, and this folder is what it holds.

        Raises:
            StoreError: the object store cannot be reached, or someone else changes it.
        """
        token = json.dumps({"by": secrets.token_hex(8), "until": time.time() + _LEASE_S}).encode()
        deadline = time.monotonic() + _WAIT_S
        while not self.remote.create(_REMOTE_LOCK, token):
            if self._lease_over():
                self.remote.delete(_REMOTE_LOCK)
            elif time.monotonic() > deadline:
                raise StoreError(
                    f"{self.remote.location.shown} is being changed by someone else for {_WAIT_S:g} s; try again, or "
                    f"delete its object {_REMOTE_LOCK} if nobody is"
                )
            else:
                time.sleep(_POLL_S)
        try:
            self.pull()
            yield
        finally:
            if self.remote.read([_REMOTE_LOCK]).get(_REMOTE_LOCK) == token:
                self.remote.delete(_REMOTE_LOCK)

    def publish(self, folder: Path, name: str, version: int) -> None:
        """Uploads an artifact that has been checked, its manifest last: until then nobody sees anything of it.

        Raises:
            ExistsError: the object store has that version.
            StoreError: it refuses.
        """
        there = f"{name}/{version}"
        for file in (TENSORS_FILE, EVALUATION_FILE):
            if (folder / file).exists():
                self.remote.upload(folder / file, f"{there}/{file}")
        if not self.remote.create(f"{there}/{MANIFEST_FILE}", (folder / MANIFEST_FILE).read_bytes()):
            raise ExistsError(f"ability '{name}' has a version {version}; publish a new version")
        if (folder / TENSORS_FILE).exists():
            self._blobs.adopt(read_manifest(folder).tensors_sha256, folder / TENSORS_FILE)
        self.refresh()

    def write_state(self, state: DesiredState) -> None:
        """Replaces the desired state.

        Raises:
            StoreError: the object store refuses.
        """
        self.remote.write(STATE_FILE, (state.model_dump_json(indent=2) + "\n").encode())
        self.refresh()

    def discard(self, name: str, version: int) -> None:
        """Removes a version's objects, the manifest first.

        Raises:
            StoreError: the object store refuses.
        """
        for file in (MANIFEST_FILE, TENSORS_FILE, EVALUATION_FILE):
            self.remote.delete(f"{name}/{version}/{file}")
        self.refresh()

    def _find(self) -> dict[str, RemoteFile]:
        return {key: file for key, file in self.remote.find().items() if _KEY.fullmatch(key)}

    def _copy(self, keys: list[str], listed: dict[str, RemoteFile]) -> None:
        contents = self.remote.read(keys)
        for key in keys:
            data = contents.get(key)
            if data is None or (len(data) != listed[key].size and key != STATE_FILE):
                raise StoreError(f"{self.remote.location.shown}: {key} changes while it is read; it is tried again")
            path = self.root / key
            if path.name == MANIFEST_FILE:  # of other content now; what lies beside it is not its any more
                for beside in (TENSORS_FILE, EVALUATION_FILE):
                    (path.parent / beside).unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, data)

    def _remove(self, keys: set[str]) -> None:
        for key in keys:
            path = self.root / key
            path.unlink(missing_ok=True)
            if path.name == MANIFEST_FILE:
                shutil.rmtree(path.parent, ignore_errors=True)

    def _evict(self, listed: dict[str, RemoteFile], used: Path) -> None:
        try:
            state = read_state(self.root)
        except StoreError as exc:  # then it is not known what is active; a request must not fail for it
            _log.warning("nothing is evicted from the store's cache: %s", exc)
            return
        versions: dict[str, list[int]] = {}
        for key in listed:
            if key.endswith(f"/{MANIFEST_FILE}"):
                name, version, _ = key.split("/")
                versions.setdefault(name, []).append(int(version))
        folders = {(name, version): self.root / name / str(version) for name in versions for version in versions[name]}
        active = {name: state.of(name).active or max(state.of(name).served(there), default=0)
                  for name, there in versions.items()}  # fmt: skip
        keep = [folder / TENSORS_FILE for (name, version), folder in folders.items() if active[name] == version]
        self._blobs.evict([folder / TENSORS_FILE for folder in folders.values()], [*keep, used])

    def _lease_over(self) -> bool:
        held = self.remote.read([_REMOTE_LOCK]).get(_REMOTE_LOCK)
        if held is None:
            return False
        try:
            return bool(json.loads(held)["until"] < time.time())
        except (ValueError, KeyError, TypeError):
            return False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / _LOCK_FILE, timeout=_WAIT_S):
                yield
        except Timeout:
            raise StoreError(f"{self.root} is being brought up to date by another process for {_WAIT_S:g} s") from None
        except OSError as exc:
            raise self._unwritable(exc) from exc

    def _unwritable(self, exc: OSError) -> StoreError:
        return StoreError(f"the store's cache {self.root} cannot be written: {exc.strerror or exc}")

    def _age_s(self) -> float:
        try:
            return time.time() - (self.root / _INDEX_FILE).stat().st_mtime
        except OSError:
            return float("inf")

    def _index(self) -> dict[str, RemoteFile]:
        try:
            written = json.loads((self.root / _INDEX_FILE).read_bytes())
            return {key: RemoteFile(size, signature) for key, (size, signature) in written.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # everything is read once more

    def _write_index(self, found: dict[str, RemoteFile]) -> None:
        path = self.root / _INDEX_FILE
        if path.exists() and found == self._index():
            os.utime(path)
            return
        text = json.dumps({key: [file.size, file.signature] for key, file in found.items()})
        _replace(path, text.encode())


def _copied(key: str) -> bool:
    return key == STATE_FILE or key.endswith(f"/{MANIFEST_FILE}")


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    staged = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        staged.chmod(0o644)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
