"""A thousand uploads with something wrong: each has its own answer, and none leaves anything behind."""

from __future__ import annotations

import gc
import os
import secrets
import shutil
from random import Random

import psutil

from act_serve.delta.artifact import read_artifact
from tests.server.admin_server import ADMIN, Server
from tests.server.mutated_artifacts import Upload, mutated, read_files

# Every run tries others; a run that failed is repeated by setting this variable to the seed that it printed.
_SEED = "ACT_SERVE_FUZZ_SEED"
_UPLOADS, _WARM_UP = 1200, 300
_REFUSALS = {400, 409, 413, 422}
_MEGABYTE = 1 << 20
# Torch's and the allocator's own coming and going; an upload is 0.1 MB, and 900 of them kept are more than this.
_MAX_GROWTH = 48 * _MEGABYTE


def test_mutated_uploads_are_refused_whole_or_accepted_whole(server: Server) -> None:
    seed = int(os.environ.get(_SEED) or secrets.randbits(32))
    print(f"{_SEED}={seed}")
    files, process = read_files(server.folder("fr", 1)), psutil.Process()
    counts: dict[int, int] = {}
    before = (0, 0)
    for number in range(_UPLOADS):
        if number == _WARM_UP:
            before = _use(process)
        upload = mutated(files, Random(f"{seed}/{number}"))
        status = _send(server, upload, f"{_SEED}={seed}, upload {number}: {upload.story}")
        counts[status] = counts.get(status, 0) + 1
    rss, descriptors = _use(process)
    print(f"statuses {dict(sorted(counts.items()))}, memory +{(rss - before[0]) / _MEGABYTE:.1f} MB")
    assert counts.keys() >= {201, *_REFUSALS}, f"{counts}: the mutations no longer reach every kind of refusal"
    assert rss - before[0] < _MAX_GROWTH
    assert descriptors <= before[1] + 2
    assert server.upload("math", 1).status_code == 201
    assert server.used("math") == "math@1*1"


def _send(server: Server, upload: Upload, which: str) -> int:
    reply = server.client.post("/v1/abilities", content=upload.content(), headers={**ADMIN, **upload.headers})
    if reply.status_code == 201:
        _take_back(server, reply.json()["name"], reply.json()["added"], which)
    else:
        assert reply.status_code in _REFUSALS, f"{which}: {reply.status_code} {reply.text[:300]}"
        assert reply.json()["error"]["message"], which
        assert str(server.root) not in reply.text, which
    assert server.left() == [], which
    return reply.status_code


def _take_back(server: Server, name: str, version: int, which: str) -> None:
    """What was accepted is a sound artifact under its own name."""
    manifest, modules = read_artifact(server.root / name / str(version))
    assert (manifest.name, manifest.version) == (name, version), which
    assert modules, which
    shutil.rmtree(server.root / name)


def _use(process: psutil.Process) -> tuple[int, int]:
    gc.collect()
    return process.memory_info().rss, process.num_fds()
