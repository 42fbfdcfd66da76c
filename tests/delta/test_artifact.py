"""An artifact is written whole, read back equal, and refused with its own message when it is damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save

from act_serve.abilities.store import Store
from act_serve.delta import artifact as artifact_module
from act_serve.delta import file_hashes
from act_serve.delta.artifact import ModuleDelta, ReadBuffer, read_artifact, serialize_modules, write_artifact
from act_serve.delta.manifest import MANIFEST_FILE, TENSORS_FILE
from act_serve.errors import ArtifactDamagedError, StoreError
from tests.abilities_for_tests import manifest_for, publish_random, random_modules

# More than what file systems round times to.
CLOCK_TICK_S = 0.02


@pytest.fixture
def artifact(tiny_llama: Path, tmp_path: Path) -> Path:
    return publish_random(Store(tmp_path), tiny_llama, "fr", seed=1)


def rewrite(artifact: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes tensors and makes size and hash agree again, as a careless tool would."""
    tensors = load_file(artifact / TENSORS_FILE)
    change(tensors)
    data = save(tensors, metadata={"format": "pt"})
    (artifact / TENSORS_FILE).write_bytes(data)
    edit(artifact, tensors_sha256=hashlib.sha256(data).hexdigest(), counts={"bytes": len(data)})


def edit(artifact: Path, **fields: Any) -> None:
    path = artifact / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    for key, value in fields.items():
        manifest[key] = {**manifest[key], **value} if isinstance(value, dict) and key in manifest else value
    path.write_text(json.dumps(manifest))


def test_reads_back_what_was_written(artifact: Path, tiny_llama: Path) -> None:
    manifest, modules = read_artifact(artifact)
    expected = random_modules(tiny_llama, seed=1)
    assert manifest.name == "fr"
    assert modules.keys() == expected.keys()
    for name, module in expected.items():
        assert torch.equal(modules[name].rows, module.rows)
        assert torch.equal(modules[name].delta, module.delta)


def test_equal_deltas_are_equal_bytes(tiny_llama: Path) -> None:
    modules = random_modules(tiny_llama, seed=1)
    assert serialize_modules(modules) == serialize_modules(dict(reversed(modules.items())))


def test_is_immutable_and_leaves_nothing_half_written(artifact: Path, tiny_llama: Path) -> None:
    modules = random_modules(tiny_llama, seed=2)
    tensors = serialize_modules(modules)
    with pytest.raises(StoreError, match="immutable"):
        write_artifact(artifact, manifest_for(tiny_llama, "fr", 1, modules, tensors), tensors)
    with pytest.raises(ArtifactDamagedError):
        write_artifact(artifact.parent / "2", manifest_for(tiny_llama, "fr", 2, modules, tensors), tensors[:-1])
    blocked = artifact / MANIFEST_FILE / "3"
    with pytest.raises(StoreError, match="nothing was published"):
        write_artifact(blocked, manifest_for(tiny_llama, "fr", 3, modules, tensors), tensors)
    assert [path.name for path in artifact.parent.iterdir()] == ["1"]


MODULE = "model.layers.0.mlp.up_proj"


def truncate(artifact: Path) -> None:
    path = artifact / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-10])


def flip_bit(artifact: Path) -> None:
    data = bytearray((artifact / TENSORS_FILE).read_bytes())
    data[-1] ^= 1
    (artifact / TENSORS_FILE).write_bytes(data)


def no_modules(artifact: Path) -> None:
    path = artifact / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules": {}}))


def set_rows(rows: list[int], at: int = 0) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        old = tensors[f"{MODULE}.rows"]
        start = at % len(old)
        old[start : start + len(rows)] = torch.tensor(rows[: len(old)])

    return lambda artifact: rewrite(artifact, change)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "bytes, the manifest says"),
    "bit flipped": (flip_bit, "sha256"),
    "wrong hash": (lambda a: edit(a, tensors_sha256="0" * 64), "sha256"),
    "no tensors file": (lambda a: (a / TENSORS_FILE).unlink(), "cannot be read"),
    "no manifest": (lambda a: (a / MANIFEST_FILE).unlink(), "is this an ability folder"),
    "manifest not json": (lambda a: (a / MANIFEST_FILE).write_text("{"), "not a valid ability manifest"),
    "unknown key": (lambda a: edit(a, surprise=1), "surprise"),
    "other schema": (lambda a: edit(a, schema_version=2), "schema_version"),
    "missing tensor": (lambda a: rewrite(a, lambda t: t.pop(f"{MODULE}.delta")), f"tensors of {MODULE} are missing"),
    "extra tensor": (lambda a: rewrite(a, lambda t: t.update(extra=torch.ones(1))), "not in the manifest"),
    "row out of range": (set_rows([9999]), "ascending, unique"),
    "negative row": (set_rows([-1]), "ascending, unique"),
    "last rows whose difference is no int32": (set_rows([2**31 - 1, -(2**31)], at=-2), "ascending, unique"),
    "row repeated": (set_rows([0, 0]), "ascending, unique"),
    "rows as int64": (
        lambda a: rewrite(a, lambda t: t.update({f"{MODULE}.rows": t[f"{MODULE}.rows"].long()})), "not int32"),
    "other shape": (
        lambda a: rewrite(a, lambda t: t.update({f"{MODULE}.delta": t[f"{MODULE}.delta"][:, 1:].clone()})), "delta is"),
    "a float without arithmetic": (
        lambda a: rewrite(a, lambda t: t.update({f"{MODULE}.delta": t[f"{MODULE}.delta"].to(torch.float8_e4m3fn)})),
        "float8_e4m3fn"),
    "more channels than a row can name": (
        lambda a: edit(a, modules={MODULE: {"rows": 1, "out_features": 2**70, "in_features": 1}}), "out_features"),
    "a version that no composition can name": (lambda a: edit(a, version=10**9), "version"),
    "not a number": (
        lambda a: rewrite(a, lambda t: t[f"{MODULE}.delta"].fill_(float("nan"))), "NaN"),
    "no modules": (no_modules, "not in the manifest"),
    "wrong counts": (lambda a: edit(a, counts={"channels": 1}), "counts"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_with_its_own_message(name: str, artifact: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    damage(copy)
    with pytest.raises(ArtifactDamagedError, match=message):
        read_artifact(copy)


def test_bias_is_kept(tiny_qwen: Path, tmp_path: Path) -> None:
    _, modules = read_artifact(publish_random(Store(tmp_path), tiny_qwen, "b", seed=1))
    bias = modules["model.layers.0.self_attn.q_proj"].bias_delta
    assert bias is not None
    assert bias.shape == modules["model.layers.0.self_attn.q_proj"].rows.shape
    assert isinstance(modules["model.layers.0.mlp.up_proj"], ModuleDelta)
    assert modules["model.layers.0.mlp.up_proj"].bias_delta is None


def test_one_buffer_takes_artifacts_of_any_size_in_turn(tiny_qwen: Path, tmp_path: Path) -> None:
    store, buffer = Store(tmp_path), ReadBuffer(most=10_000)
    folders = [
        publish_random(store, tiny_qwen, f"a{n}", seed=n, share=share) for n, share in enumerate([0.1, 0.9, 0.2])
    ]
    assert max(f.stat().st_size for folder in folders for f in folder.iterdir()) > 10_000
    for folder in (*folders, *folders):
        _, expected = read_artifact(folder)
        _, found = read_artifact(folder, buffer=buffer)
        assert all(torch.equal(found[name].delta, module.delta) for name, module in expected.items())
        assert all(torch.equal(found[name].rows, module.rows) for name, module in expected.items())


def test_a_file_is_hashed_again_only_when_it_was_written_to(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, buffer = publish_random(Store(tmp_path), tiny_qwen, "a", seed=1), ReadBuffer()
    sha256 = Mock(wraps=hashlib.sha256)
    monkeypatch.setattr(artifact_module.hashlib, "sha256", sha256)
    monkeypatch.setattr(file_hashes, "_COARSEST_TIME_NS", 10**15)
    for _ in range(2):
        read_artifact(folder, buffer=buffer)
    assert sha256.call_count == 2, "a file as young as this may change and keep its time"
    monkeypatch.setattr(file_hashes, "_COARSEST_TIME_NS", 0)
    for _ in range(2):
        read_artifact(folder, buffer=buffer)
    assert sha256.call_count == 3

    tensors = folder / TENSORS_FILE
    times = tensors.stat()
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    time.sleep(CLOCK_TICK_S)
    tensors.write_bytes(data)
    os.utime(tensors, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ArtifactDamagedError, match="sha256"):
        read_artifact(folder, buffer=buffer)


def test_what_changes_while_a_known_file_is_read_is_noticed(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, buffer = publish_random(Store(tmp_path), tiny_qwen, "a", seed=1), ReadBuffer()
    monkeypatch.setattr(file_hashes, "_COARSEST_TIME_NS", 0)
    read_artifact(folder, buffer=buffer)
    tensors = folder / TENSORS_FILE
    data, look = bytearray(tensors.read_bytes()), artifact_module.file_state
    data[-1] ^= 1

    def looked_then_written(file: int) -> tuple[int, ...]:
        found = look(file)
        if bytes(data) != tensors.read_bytes():
            time.sleep(CLOCK_TICK_S)
            tensors.write_bytes(data)
        return found

    monkeypatch.setattr(artifact_module, "file_state", looked_then_written)
    with pytest.raises(ArtifactDamagedError, match="sha256"):
        read_artifact(folder, buffer=buffer)
