"""Stages of a build that are kept on disk, so that an interrupted build goes on where it stopped."""

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from act_serve.errors import BuildError, ModelError
from act_serve.models.free_memory import out_of_memory, return_freed
from act_serve.pipeline.peak_memory import forget_peak, peak_bytes
from act_serve.pipeline.processes import is_first

RECORD = "record.json"
_POLL_S, _LONG_S = 0.2, 300.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage: its files are in `folder`; `key` names its inputs and so everything in it.

    `peak_bytes` is the most memory that making it took beside what was held when it began: on the GPU where there is
    one, else of the process, mapped files included. Where Linux's /proc is missing it is only what went beyond the peak
    of all earlier stages. 0 where it is not known.
    """

    folder: Path
    key: str
    seconds: float
    peak_bytes: int
    resumed: bool


def stage_key(inputs: Mapping[str, Any]) -> str:
    """The name of everything that a stage with these `inputs` makes."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def run_stage(
    work: Path, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None], *, together: bool = False
) -> Stage:
    """Returns the stage `name` of the build in `work`: kept from an earlier run with the same `inputs`, else made.

    `inputs` is JSON and holds all that the result depends on, keys of earlier stages included. `make` fills the
    empty folder that it is given; the stage appears only when it is complete. Where several processes build, the first
    one makes it and the others wait; what they make `together` all work on, and the first one's is kept. Raises
    BuildError when the disk is full or not writable, or memory runs out.
    """
    key = stage_key(inputs)
    folder = work / name
    kept = _kept(folder, key)
    if kept is None and not is_first() and not together:
        kept = _waited_for(folder, key)
    if kept is not None:
        return kept
    staging = work / f".{name}.{_machine()}.{os.getpid()}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        return_freed()  # or what earlier stages left would hide what this one takes
        forget_peak()
        held = peak_bytes()
        start = time.monotonic()
        make(staging)
        seconds = time.monotonic() - start
        peak = max(peak_bytes() - held, 0)
        record = {"key": key, "seconds": round(seconds, 1), "peak_bytes": peak, "inputs": dict(inputs)}
        (staging / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if not is_first():
            return _waited_for(folder, key)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    except (OSError, SafetensorError) as exc:
        raise BuildError(f"stage {name} could not be kept in {work}: {exc}; earlier stages are safe") from exc
    except (MemoryError, RuntimeError, ModelError) as exc:  # ModelError: a model that does not fit
        if not out_of_memory(exc):
            raise
        raise BuildError(
            f"stage {name} ran out of memory; end what else uses it, lower batch_size of source.train and finetune and "
            "finetune.retention.items_per_step, or use a smaller model pair. Earlier stages are kept"
        ) from exc
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Stage(folder, key, seconds, peak, resumed=False)


def clear_leftovers(work: Path) -> None:
    """Removes what processes of this machine that were killed in a stage left in `work`.

    Only for whoever is alone there: processes of another container may have the same numbers.
    """
    for folder in work.glob(f".*.{escape(_machine())}.*"):
        number = folder.suffix[1:]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _machine() -> str:
    return socket.gethostname() or "localhost"


def _kept(folder: Path, key: str) -> Stage | None:
    record = _record(folder)
    if record.get("key") != key:
        return None
    return Stage(folder, key, float(record["seconds"]), int(record.get("peak_bytes", 0)), resumed=True)


def _waited_for(folder: Path, key: str) -> Stage:
    """The stage once the first process has made it; where that one fails, its launcher ends this one."""
    start, said = time.monotonic(), False
    while (kept := _kept(folder, key)) is None:
        if not said and time.monotonic() - start > _LONG_S:
            said = True
            _log.warning("still waiting for the first process to make %s, which all must share (--work)", folder)
        time.sleep(_POLL_S)
    return kept


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
