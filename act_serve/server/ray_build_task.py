"""What runs in a worker process of a cluster: one build, and what it tells the others."""

import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import ray

from act_serve.abilities.store import open_store
from act_serve.errors import ActServeError, BuildError
from act_serve.pipeline.progress import Screen
from act_serve.pipeline.training import Report
from act_serve.profile.schema import Profile

LOG = "build.log"
_EVERY_STEPS = 20


@dataclass(frozen=True, slots=True)
class Order:
    """One build: `marks` are files that the worker must see; it starts in `folder` with `environment` set."""

    profile: Profile
    store: str
    work: Path
    marks: list[Path]
    environment: dict[str, str]
    folder: Path
    threads: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a build: the folder of what it published, or what went wrong and its exit code."""

    name: str
    folder: Path | None = None
    message: str = ""
    exit_code: int = 0
    attempts: int = 1


@ray.remote
class Board:
    """What every build is doing; a tiny actor that workers write to and the command reads."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[str, int, int, str]] = {}

    def start(self, name: str, pid: int, node: str) -> int:
        """Notes a new process of a build and returns how many it has had."""
        attempt = self._lines.get(name, ("", 0, 0, ""))[1] + 1
        self._lines[name] = ("starts", attempt, pid, node)
        return attempt

    def say(self, name: str, stage: str) -> None:
        """Notes what a build is doing."""
        _, attempt, pid, node = self._lines.get(name, ("", 1, 0, ""))  # this actor too may have died and come back
        self._lines[name] = (stage, attempt, pid, node)

    def read(self) -> dict[str, tuple[str, int, int, str]]:
        """By build: what it is doing, its attempt, its process and its machine."""
        return self._lines


class BoardScreen(Screen):
    """Shows a build on the board, and writes what a terminal would have shown to a log."""

    def __init__(self, name: str, board: Any, log: TextIO) -> None:
        from rich.console import Console

        super().__init__(Console(file=log, width=120))
        self._name, self._board, self._log = name, board, log

    def note(self, text: str) -> None:
        super().note(text)
        self._log.flush()

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Reports the stage now and every twentieth of its steps."""
        self._board.say.remote(self._name, name)

        def report(done: int, total: int, remark: str) -> None:
            if done == total or done % max(1, total // _EVERY_STEPS) == 0:
                self._board.say.remote(self._name, f"{name} {done}/{total} {remark}")

        yield report


def run_order(order: Order, board: Any) -> Outcome:
    """Builds one ability; an error becomes the outcome, so that Ray repeats only what died."""
    name = order.profile.name
    attempt: int = ray.get(board.start.remote(name, os.getpid(), socket.gethostname()))
    os.environ.update(order.environment)
    try:
        _require_shared(order.marks)
        if order.folder.is_dir():
            os.chdir(order.folder)  # a profile may name models by relative paths
        return Outcome(name, folder=_build(order, board), attempts=attempt)
    except ActServeError as exc:
        return Outcome(name, message=str(exc), exit_code=exc.exit_code, attempts=attempt)
    except Exception as exc:
        where = traceback.format_exception(exc)[-2].strip().splitlines()[0]
        message = f"{type(exc).__name__}: {exc} ({where})"
        return Outcome(name, message=message, exit_code=ActServeError.exit_code, attempts=attempt)


def _build(order: Order, board: Any) -> Path:
    import torch
    from transformers.utils import logging

    from act_serve.pipeline.run import build

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(order.threads)
    work = order.work / order.profile.name
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOG).open("a", encoding="utf-8") as log:
        screen = BoardScreen(order.profile.name, board, log)
        return build(order.profile, store=open_store(order.store), work=work, screen=screen)


def _require_shared(marks: list[Path]) -> None:
    missing = [str(mark.parent) for mark in marks if not mark.exists()]
    if missing:
        raise BuildError(
            f"the machine {socket.gethostname()} does not see {' and '.join(missing)} of the machine that started the "
            "builds; set ACT_SERVE_HOME, --work and --store to folders on storage that all machines share"
        )
