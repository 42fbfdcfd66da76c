"""A whole server in a process of its own, started as a user does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from tests.ports import free_port

COMMAND = [sys.executable, "-c", "from act_serve.cli.main import main; main()"]
# Generous: this is how long a hang may take to be noticed, not what a start may take.
_START_TIMEOUT_S = 600
_STOP_TIMEOUT_S = 120


class ServerProcess:
    """``act-serve serve`` on a free port, with a temporary folder of its own.

    Args:
        arguments: further words of the command line.
    """

    def __init__(self, *arguments: str) -> None:
        self.started_at = time.time()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.temporary = Path(tempfile.mkdtemp(prefix="as-"))  # short: Ray puts sockets in it
        self.log = self.temporary.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", "--port", str(self.port), *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )

    def wait_until_ready(self) -> None:
        """Fails with the server's own words when it ends instead."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while "Ctrl-C stops it" not in self.output():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.5)
        assert httpx.get(f"{self.url}/ready").status_code == 200

    def output(self) -> str:
        return self.log.read_text()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def interrupt(self) -> int:
        """As Ctrl-C; gives the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(_STOP_TIMEOUT_S)

    def close(self) -> None:
        """Ends it in any case."""
        try:
            self.interrupt()
        finally:
            self.process.kill()
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.log.unlink(missing_ok=True)
