"""One build at a time in a folder of stages: a second one would take away the stages that the first still reads."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from act_serve.errors import BuildError
from act_serve.pipeline.processes import is_first
from act_serve.pipeline.stages import clear_leftovers

LOCK = "build.lock"
# A network file system keeps the lock of a machine that went down for up to a minute and a half.
_WAIT_S = 120.0

_log = logging.getLogger(__name__)


@contextmanager
def alone_in(work: Path, note: Callable[[str], None]) -> Iterator[None]:
    """While it is open, no other build or analysis works in the folder `work`; clears what killed ones left there.

    Of several processes that build together, the first one holds the lock for all. `note` says that it waits. Raises
    BuildError when the other one goes on for two minutes.
    """
    # Its own stand-in where a disk has no locks is a file that a killed build would leave, and that nobody removes.
    lock = FileLock(work / LOCK, fallback_to_soft=False)
    try:
        if is_first() and _taken(lock, work, note):
            clear_leftovers(work)
        yield
    finally:
        lock.release()


def _taken(lock: BaseFileLock, work: Path, note: Callable[[str], None]) -> bool:
    """Whether the lock is held now: some file systems have none."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            note(f"another build works in {work}; waiting for up to {_WAIT_S:.0f} s")
            lock.acquire(timeout=_WAIT_S)
    except Timeout:
        raise BuildError(
            f"another build or analysis works in {work}; wait until it is done, or keep this one's stages elsewhere "
            "(--work)"
        ) from None
    except (OSError, NotImplementedError) as exc:
        _log.warning("%s can't be locked (%s): see that one build at a time works there", work, exc)
        return False
    return True
