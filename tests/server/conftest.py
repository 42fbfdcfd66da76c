"""Fixtures of the router's and the control plane's tests."""

from __future__ import annotations

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
