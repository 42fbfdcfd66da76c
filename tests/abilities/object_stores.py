"""Object stores for tests: one in memory, and S3 as moto's server speaks it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from act_serve.abilities.store import Store, open_store
from tests.ports import free_port

BUCKET = "shelf"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class ObjectStore:
    """A URL, the bare file system behind it, and stores on it as different machines have them."""

    url: str
    homes: Path
    patch: pytest.MonkeyPatch
    files: Any = field(init=False)
    root: str = field(init=False)

    def __post_init__(self) -> None:
        self.files, self.root = fsspec.core.url_to_fs(self.url)

    def machine(self, name: str = "one", url: str | None = None) -> Store:
        """The store as a process on a machine of this name opens it."""
        self.patch.setenv("ACT_SERVE_HOME", str(self.homes / name))
        return open_store(url or self.url)

    def objects(self) -> list[str]:
        """All objects, in order."""
        self.files.invalidate_cache()
        start = len(self.root) + 1
        return sorted(path[start:] for path in self.files.find(self.root))

    def put(self, key: str, data: bytes) -> None:
        """Writes an object past act-serve."""
        self.files.pipe_file(f"{self.root}/{key}", data)

    def get(self, key: str) -> bytes:
        """Reads an object past act-serve."""
        data: bytes = self.files.cat_file(f"{self.root}/{key}")
        return data


class MotoServer:
    """moto's S3 on a port of 127.0.0.1; it can be stopped and started again, with all that it held gone."""

    def __init__(self) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                break
            except OSError:
                assert self._process.poll() is None, "moto's server does not start"
                time.sleep(0.05)
        request = urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT")
        request.add_header("authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request")
        urllib.request.urlopen(request).close()

    def stop(self) -> None:
        """As if the machine had gone."""
        self._process.kill()
        self._process.wait()


@contextmanager
def environment(url: str) -> Iterator[None]:
    """What s3fs reads."""
    former = dict(os.environ)
    os.environ.update(KEYS, AWS_ENDPOINT_URL=url)
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()  # an instance keeps the endpoint that it was made with
    try:
        yield
    finally:
        kind.clear_instance_cache()
        os.environ.clear()
        os.environ.update(former)


def memory_url() -> str:
    """An empty store in this process's memory."""
    return f"memory://stores/{uuid4().hex}"


def state_of(store: ObjectStore) -> dict[str, Any]:
    """The desired state as the object store holds it."""
    return json.loads(store.get("state.json"))["abilities"]
