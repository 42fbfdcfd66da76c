"""A large file is hashed once, and again after every change, also of one that keeps size and time."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from act_serve.delta import file_hashes
from act_serve.delta.file_hashes import file_sha256
from act_serve.home import HOME_VARIABLE

# More than what file systems round times to.
CLOCK_TICK_S = 0.02


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(file_hashes, "_COARSEST_TIME_NS", 0)
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 3_000_000)
    time.sleep(CLOCK_TICK_S)
    return path


def hashed_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether another process reads the file; what it gives is its hash in any case."""
    with monkeypatch.context() as patch:
        keep = Mock()
        patch.setattr(file_hashes, "_keep", keep)
        patch.setattr(file_hashes, "_hashed", {})
        assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    return keep.called


def test_a_known_file_is_not_read_and_a_changed_one_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hashed_again(path, monkeypatch)
    file_sha256(path)
    assert not hashed_again(path, monkeypatch)
    link = path.with_name("link")
    link.symlink_to(path)
    assert not hashed_again(link, monkeypatch)
    times = path.stat()
    path.write_bytes(b"x" * 2_999_999 + b"y")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hashed_again(path, monkeypatch)


def test_a_file_that_may_still_change_unseen_is_not_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "_COARSEST_TIME_NS", 10**15)
    file_sha256(path)
    assert not list((path.parent / "home").rglob("*.json"))


@pytest.mark.parametrize("damage", ["", "[]", "null", "[1, 2]"])
def test_a_damaged_note_is_written_again(path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file_sha256(path)
    (note,) = (path.parent / "home" / "hashes").iterdir()
    note.write_text(damage)
    assert hashed_again(path, monkeypatch)
    file_hashes._hashed.clear()
    file_sha256(path)
    assert not hashed_again(path, monkeypatch)


def test_a_home_that_cannot_be_written_costs_time_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path.parent / "home").write_text("in the way")
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(file_hashes, "_keep", Mock(side_effect=AssertionError("read twice by one process")))
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
