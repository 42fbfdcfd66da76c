"""Fixtures of the router's and the control plane's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.server.admin_server import server, shelf
from tests.server.fake_engine import FakeEngine, fake_engine

__all__ = ["engine", "server", "shelf"]


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    """An engine that says what it was asked."""
    with fake_engine() as running:
        yield running


@pytest.fixture(autouse=True)
def _router_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log as in a router's process, where no engine has run before."""
    ours = logging.getLogger("act_serve")
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    monkeypatch.setattr(ours, "handlers", [])
