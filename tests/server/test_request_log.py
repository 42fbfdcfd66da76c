"""Where the lines of requests go."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from act_serve.server import request_log
from act_serve.server.request_log import log_request, open_request_log, shown_request_lines
from act_serve.server.request_record import RequestRecord


@contextmanager
def opened_log() -> Iterator[None]:
    """The log as a router's process opens it; pytest has handlers of its own on the logger."""
    logger = logging.getLogger("act_serve.requests")
    theirs, logger.handlers = logger.handlers, []
    try:
        open_request_log()
        yield
        for handler in logger.handlers:
            handler.close()
    finally:
        logger.handlers = theirs


def log(name: str) -> None:
    log_request(RequestRecord(id=name, method="GET", path="/v1/models"), 200, 0.5, "plain")


def test_lines_reach_the_terminal_of_who_started_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown_request_lines(tmp_path):
        monkeypatch.setattr(sys, "stderr", io.StringIO())  # the worker's own, which Ray keeps in a file
        with opened_log():
            for number in range(500):
                log(f"line-{number}")
            for _ in range(200):
                if terminal.getvalue().count("\n") == 500:
                    break
                time.sleep(0.05)
    shown = terminal.getvalue().splitlines()
    assert [line.split()[0] for line in shown] == [f"line-{number}" for number in range(500)]
    assert shown[0].startswith("line-0 GET /v1/models 200 key=")
    assert sys.stderr.getvalue().splitlines() == shown
    assert request_log.SOCKET_VARIABLE not in os.environ


def test_a_terminal_that_stands_still_costs_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    class Still(io.StringIO):
        def write(self, text: str) -> int:
            goes_on.wait(60)
            return super().write(text)

    terminal = Still()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(request_log, "_PAUSE_S", 0.0)
    monkeypatch.setattr(request_log, "_TURN_S", 0.0)
    before = threading.active_count()
    try:
        with shown_request_lines(tmp_path):
            monkeypatch.setattr(sys, "stderr", io.StringIO())
            with opened_log():
                for number in range(3000):
                    log(f"line-{number}-" + "x" * 500)
                assert threading.active_count() <= before + 4
                goes_on.set()
            assert sys.stderr.getvalue().count("\n") == 3000, "all lines are where Ray keeps them"
    finally:
        goes_on.set()


def test_lines_are_kept_where_nobody_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(request_log.SOCKET_VARIABLE, str(tmp_path / "nobody listens"))
    with opened_log():
        log("alone")
    assert capsys.readouterr().err.splitlines() == ["alone GET /v1/models 200 key=- seconds=0.5"]
