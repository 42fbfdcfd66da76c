"""One build at a time in a folder; what killed ones left goes, and what a living one or another machine has stays."""

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from act_serve.errors import BuildError
from act_serve.pipeline import work_lock
from act_serve.pipeline.stages import run_stage
from act_serve.pipeline.work_lock import LOCK, alone_in

KILLED_IN_A_STAGE = """
import os, sys
from pathlib import Path
from act_serve.pipeline.stages import run_stage
from act_serve.pipeline.work_lock import alone_in

def make(folder):
    (folder / "half").write_text("a model")
    os.kill(os.getpid(), 9)

work = Path(sys.argv[1])
with alone_in(work, print):
    run_stage(work, "source", {}, make)
"""


def test_what_a_killed_build_left_goes_with_the_next(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED_IN_A_STAGE, str(tmp_path)], check=False)
    (left,) = tmp_path.glob(".source.*")
    assert (left / "half").exists()
    here, gone = socket.gethostname(), left.suffix
    living, elsewhere = tmp_path / f".finetune.{here}.{os.getpid()}", tmp_path / f".source.not-{here}{gone}"
    for other in (living, elsewhere, tmp_path / ".unfinished-0123"):
        other.mkdir()
    with alone_in(tmp_path, pytest.fail):
        assert run_stage(tmp_path, "other", {}, lambda _folder: None).folder == tmp_path / "other"
    assert {path.name for path in tmp_path.iterdir()} == {
        living.name, elsewhere.name, ".unfinished-0123", "other", LOCK
    }  # fmt: skip


def test_a_second_build_waits_for_the_first(tmp_path: Path) -> None:
    said: list[str] = []
    waits = threading.Event()
    order: list[str] = []

    def note(text: str) -> None:
        said.append(text)
        waits.set()

    def second() -> None:
        with alone_in(tmp_path, note):
            order.append("second")

    with alone_in(tmp_path, pytest.fail):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert said == [f"another build works in {tmp_path}; waiting for up to 120 s"]


def test_a_second_build_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_lock, "_WAIT_S", 0.1)
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(BuildError) as caught, alone_in(tmp_path, lambda _said: None):
            pass
        refused.append(str(caught.value))

    with alone_in(tmp_path, pytest.fail):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(30)
    assert "another build or analysis works in" in refused[0]


def test_processes_that_build_together_share_the_first_one_s_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alone_in(tmp_path, pytest.fail):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with alone_in(tmp_path, pytest.fail):
            pass


def test_a_disk_without_locks_is_said_and_nothing_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unlockable(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unlockable)
    left = tmp_path / f".source.{socket.gethostname()}.999999999"
    left.mkdir()
    with alone_in(tmp_path, pytest.fail):
        assert left.exists()
    assert "can't be locked" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} <= {left.name, work_lock.LOCK}
