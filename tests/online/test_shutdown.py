"""Runs last in this folder: ends the session's server and looks for what it left."""

from __future__ import annotations

import psutil
import pytest

from act_serve.server.leftovers import orphaned_semaphores, shared_memory_of
from tests.online.server_process import ServerProcess

pytestmark = pytest.mark.slow


def test_an_interrupt_leaves_nothing_behind(server: ServerProcess) -> None:
    processes = server.descendants()
    mapped = shared_memory_of(processes)
    assert len(processes) > 5
    assert server.interrupt() == 0, server.output()
    assert [process for process in processes if psutil.pid_exists(process.pid) and process.is_running()] == []
    assert [file for file in mapped if file.exists()] == []
    assert orphaned_semaphores(server.started_at) == frozenset()
    assert list(server.temporary.iterdir()) == []
    assert server.output().rstrip().endswith("stopped")
    assert "Traceback" not in server.output()
