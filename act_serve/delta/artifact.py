"""Reading and writing an ability artifact. Heavy: imports torch.

Tensors of ``channel_delta.safetensors``, per module of the checkpoint (k changed rows of n, each of length d)::

    <module>.rows        int32 [k]   ascending, unique, in [0, n)
    <module>.delta       [k, d]      what is added to those rows, strength and fine-tuning included
    <module>.bias_delta  [k]         only where the module's bias changes too
    <module>.scale       fp32 [k]    only in the stored form int8: what a row of <module>.delta, int8, is multiplied by
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from act_serve.delta.durable import sync_folder
from act_serve.delta.file_hashes import file_state, is_settled
from act_serve.delta.manifest import (
    MANIFEST_FILE,
    TENSORS_FILE,
    Counts,
    Manifest,
    ModuleEntry,
    Stored,
    dump_manifest,
    read_manifest,
)
from act_serve.delta.stored_form import dequantise, quantise, rounded
from act_serve.delta.tensor_views import view_tensors
from act_serve.errors import ArtifactDamagedError, StoreError

# Hashed while the core's cache holds it.
_CHUNK_BYTES = 256 << 10
# Torch has no arithmetic for its narrower floating types.
_FLOATING = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})


@dataclass(frozen=True, slots=True)
class ModuleDelta:
    """The changed rows of one module.

    Attributes:
        rows: ``[k]`` int32, ascending, unique.
        delta: ``[k, in_features]``, floating.
        bias_delta: ``[k]``, floating, or None.
    """

    rows: torch.Tensor
    delta: torch.Tensor
    bias_delta: torch.Tensor | None = None


def as_stored(modules: Mapping[str, ModuleDelta], stored: Stored) -> dict[str, ModuleDelta]:
    """The deltas exactly as :func:`read_artifact` gives them back from an artifact of this form, in bfloat16."""
    return {
        name: ModuleDelta(
            module.rows.to(torch.int32),
            rounded(module.delta, stored),
            None if module.bias_delta is None else module.bias_delta.bfloat16(),
        )
        for name, module in modules.items()
    }


def serialize_modules(modules: Mapping[str, ModuleDelta], stored: Stored | None = None) -> bytes:
    """The bytes of ``channel_delta.safetensors``; equal deltas give equal bytes.

    Args:
        modules: the deltas, in any floating dtype.
        stored: the form to round them to; None keeps every dtype.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, module in sorted(modules.items()):
        delta, bias = module.delta, module.bias_delta
        if stored == "int8":
            delta, tensors[f"{name}.scale"] = quantise(delta)
        elif stored is not None:
            delta = rounded(delta, stored)
        tensors[f"{name}.rows"] = module.rows.to(torch.int32).contiguous()
        tensors[f"{name}.delta"] = delta.contiguous()
        if bias is not None:
            tensors[f"{name}.bias_delta"] = (bias if stored is None else bias.bfloat16()).contiguous()
    return save_tensors(tensors, metadata={"format": "pt"})


def count_modules(modules: Mapping[str, ModuleDelta], size: int) -> Counts:
    """Counts for the manifest of a tensors file of ``size`` bytes."""
    return Counts(
        channels=sum(m.rows.numel() for m in modules.values()),
        parameters=sum(_parameters(module) for module in modules.values()),
        bytes=size,
    )


def entries_of(modules: Mapping[str, ModuleDelta], out_features: Mapping[str, int]) -> dict[str, ModuleEntry]:
    """The manifest's ``modules`` for these deltas; ``out_features`` gives each module's number of channels."""
    return {
        name: ModuleEntry(
            rows=m.rows.numel(),
            out_features=out_features[name],
            in_features=m.delta.shape[1],
            bias=m.bias_delta is not None,
        )
        for name, m in sorted(modules.items())
    }


def write_artifact(folder: Path, manifest: Manifest, tensors: bytes, files: Mapping[str, bytes] | None = None) -> Path:
    """Writes an artifact folder so that it appears whole or not at all.

    Args:
        folder: where it will lie; must not exist (artifacts are immutable).
        manifest: already holding the counts and the sha256 of ``tensors``.
        tensors: from :func:`serialize_modules`.
        files: further files by relative path, such as ``evaluation.json``.

    Raises:
        StoreError: the folder exists, or the disk refuses.
        ArtifactDamagedError: the tensors are not what the manifest says.
    """
    what = f"{manifest.name}@{manifest.version}"
    _check_tensors(manifest, bytearray(tensors), hashlib.sha256(tensors).hexdigest(), what)
    if folder.exists():
        raise StoreError(f"{folder} exists already; artifacts are immutable: publish a new version")
    staged: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name, data in [(TENSORS_FILE, tensors), *(files or {}).items()]:
            _write_durably(staged / name, data)
        _write_durably(staged / MANIFEST_FILE, dump_manifest(manifest).encode())
        staged.chmod(0o755)
        staged.rename(folder)
        sync_folder(folder.parent)
    except OSError as exc:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        raise StoreError(f"cannot write the artifact {folder}: {exc.strerror or exc}; nothing was published") from exc
    return folder


class ReadBuffer:
    """Memory that artifacts are read into, one after the other: new memory takes longer to get than to fill.

    A file that was hashed once is hashed again only when the file system says that it is another one, or that it was
    written to: abilities come and go, and hashing takes as long as everything else about reading them.

    Args:
        most: bytes that it keeps; a larger file gets memory of its own.
    """

    def __init__(self, most: int = 64 << 20) -> None:
        self._most, self._kept = most, bytearray()
        self._hashed: dict[Path, tuple[tuple[int, ...], str]] = {}

    def read(self, path: Path) -> tuple[memoryview, str]:
        """The bytes of a file, until the next one is read, and their sha256; raises OSError."""
        with path.open("rb", buffering=0) as file:
            state = file_state(file.fileno())
            then, known = self._hashed.get(path, (state, ""))
            digest = None if known and then == state else hashlib.sha256()
            size, memory = state[2], self._kept
            if size > len(memory):
                memory = bytearray(size)
                if size <= self._most:
                    self._kept = memory
            whole, filled = memoryview(memory)[:size], 0
            while count := file.readinto(whole[filled : filled + _CHUNK_BYTES]):
                if digest:
                    digest.update(whole[filled : filled + count])
                filled += count
            unchanged = file_state(file.fileno()) == state
        whole = whole[:filled]
        if digest:
            known = digest.hexdigest()
            if unchanged and is_settled(state):
                self._hashed[path] = state, known
        elif not unchanged:
            known = hashlib.sha256(whole).hexdigest()
        return whole, known


def read_artifact(
    folder: Path, what: str | None = None, buffer: ReadBuffer | None = None
) -> tuple[Manifest, dict[str, ModuleDelta]]:
    """Reads an artifact and checks everything that can be checked without the base model.

    Rows that are stored as int8 come back in bfloat16.

    Args:
        folder: the artifact.
        what: its name in messages, where clients must not learn the folder.
        buffer: to read it into; what comes back may lie there and holds until the next artifact is read into it.

    Raises:
        ArtifactDamagedError: a file is missing or truncated, the hash differs, a tensor is missing, unknown, of
            another shape, not finite, or its rows are repeated, unsorted or out of range.
    """
    manifest = read_manifest(folder, what)
    what = what or str(folder)
    try:
        data, digest = (buffer or ReadBuffer(0)).read(folder / TENSORS_FILE)
    except OSError as exc:
        raise _unreadable(what, exc) from exc
    return manifest, _check_tensors(manifest, data, digest, what)


def check_size(manifest: Manifest, folder: Path, *, what: str) -> None:
    """Compares a tensors file's size with its manifest, without reading it.

    Raises:
        ArtifactDamagedError: the file is missing or truncated.
    """
    try:
        size = (folder / TENSORS_FILE).stat().st_size
    except OSError as exc:
        raise _unreadable(what, exc) from exc
    if size != manifest.counts.bytes:
        raise _other_size(manifest, size, what)


def _check_tensors(manifest: Manifest, data: bytearray | memoryview, digest: str, what: str) -> dict[str, ModuleDelta]:
    """Parses a tensors file and compares it with its manifest, down to every row index; the result lies in ``data``."""

    def damaged(reason: str) -> ArtifactDamagedError:
        return _damaged(what, reason)

    if len(data) != manifest.counts.bytes:
        raise _other_size(manifest, len(data), what)
    if digest != manifest.tensors_sha256:
        raise damaged("its sha256 is not the manifest's")
    try:
        tensors = view_tensors(data)
    except ValueError as exc:
        raise damaged(f"not a safetensors file ({exc})") from exc
    modules = {}
    for name, entry in manifest.modules.items():
        rows, delta = tensors.pop(f"{name}.rows", None), tensors.pop(f"{name}.delta", None)
        bias = tensors.pop(f"{name}.bias_delta", None)
        if rows is None or delta is None or (bias is not None) != entry.bias:
            raise damaged(f"tensors of {name} are missing, or its bias is not as the manifest says")
        if manifest.stored == "int8":
            scale = tensors.pop(f"{name}.scale", None)
            if problem := _quantised_problem(delta, scale, entry):
                raise damaged(f"{name}: {problem}")
            delta = dequantise(delta, scale)
        module = ModuleDelta(rows, delta, bias)
        if problem := _problem(module, entry):
            raise damaged(f"{name}: {problem}")
        modules[name] = module
    if disordered := _disordered(manifest, modules):
        size = manifest.modules[disordered].out_features
        raise damaged(f"{disordered}: rows are not ascending, unique and in [0, {size})")
    if tensors:
        raise damaged(f"{len(tensors)} tensors are not in the manifest, the first is {min(tensors)[:120]}")
    if count_modules(modules, len(data)) != manifest.counts:
        raise damaged("the manifest's counts are not those of its tensors")
    return modules


def _damaged(what: str, reason: str) -> ArtifactDamagedError:
    return ArtifactDamagedError(f"{what}: {TENSORS_FILE} is damaged: {reason}; restore or rebuild the artifact")


def _other_size(manifest: Manifest, size: int, what: str) -> ArtifactDamagedError:
    return _damaged(what, f"it has {size} bytes, the manifest says {manifest.counts.bytes}")


def _unreadable(what: str, exc: OSError) -> ArtifactDamagedError:
    return ArtifactDamagedError(
        f"{what}: {TENSORS_FILE} cannot be read ({exc.strerror}); restore or rebuild the artifact"
    )


def _parameters(module: ModuleDelta) -> int:
    return module.delta.numel() + (0 if module.bias_delta is None else module.bias_delta.numel())


def _quantised_problem(delta: torch.Tensor, scale: torch.Tensor | None, entry: ModuleEntry) -> str | None:
    if delta.dtype != torch.int8 or delta.dim() != 2:
        return f"delta is {delta.dtype} {tuple(delta.shape)}, not int8 ({entry.rows}, {entry.in_features})"
    if scale is None or scale.dtype != torch.float32 or scale.shape != delta.shape[:1]:
        return f"its scale is missing or not float32 ({entry.rows},)"
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        return "a scale is not finite and positive"
    return None


def _problem(module: ModuleDelta, entry: ModuleEntry) -> str | None:
    rows, delta, bias = module.rows, module.delta, module.bias_delta
    if rows.dtype != torch.int32 or rows.shape != (entry.rows,):
        return f"rows are {rows.dtype} {tuple(rows.shape)}, not int32 ({entry.rows},)"
    if delta.dtype not in _FLOATING or delta.shape != (entry.rows, entry.in_features):
        return f"delta is {delta.dtype} {tuple(delta.shape)}, not floating ({entry.rows}, {entry.in_features})"
    if bias is not None and (bias.dtype not in _FLOATING or bias.shape != (entry.rows,)):
        return f"bias_delta is {bias.dtype} {tuple(bias.shape)}, not floating ({entry.rows},)"
    if not _finite(delta) or (bias is not None and not _finite(bias)):
        return "the delta holds NaN or infinity"
    return None


def _disordered(manifest: Manifest, modules: Mapping[str, ModuleDelta]) -> str | None:
    """The first module whose rows are not ascending, unique and inside it; all at once, which is faster."""
    if not modules:
        return None
    names = list(modules)
    rows_R = np.concatenate([modules[name].rows.numpy() for name in names])
    counts_M = np.array([len(modules[name].rows) for name in names])
    ends_M = np.cumsum(counts_M)
    starts_M = ends_M - counts_M
    outs_M = np.array([manifest.modules[name].out_features for name in names])
    falls_R = rows_R < 0
    falls_R[1:] |= rows_R[1:] <= rows_R[:-1]
    falls_R[starts_M] = rows_R[starts_M] < 0
    wrong_M = np.add.reduceat(falls_R, starts_M) > 0
    wrong_M |= rows_R[ends_M - 1] >= outs_M
    return names[int(wrong_M.argmax())] if wrong_M.any() else None


def _finite(values: torch.Tensor) -> bool:
    # NaN and infinity are what the extremes of a tensor with one are; a tenth of the time of isfinite().all().
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values))


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
