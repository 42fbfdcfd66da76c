"""Fixtures of the control plane's tests."""

from __future__ import annotations

from tests.server.admin_server import engine, server, shelf

__all__ = ["engine", "server", "shelf"]
