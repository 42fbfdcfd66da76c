"""Artifacts with something wrong, as uploads: in the manifest, in the tensors, in the archive or in the request."""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

from act_serve.delta.manifest import EVALUATION_FILE, MANIFEST_FILE, TENSORS_FILE

Files = dict[str, bytes]

_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**70, 10**400, 1e308, 0.5, "", "fr", "x" * 5000, "../../etc/passwd"),
    *("\0", "é\u202e", "\ud800", [], {}, [[]], {"a": {}}, ["fr"] * 3000, "NaN", float("nan"), float("inf")),
)
_PATHS = (
    *(f"../{MANIFEST_FILE}", f"/tmp/{MANIFEST_FILE}", f"a/b/{MANIFEST_FILE}", f"a\\{MANIFEST_FILE}", "x.pkl"),
    *(f"c:{MANIFEST_FILE}", f"fr/../{MANIFEST_FILE}", f"./{MANIFEST_FILE}", "\udcff", "", ".", "..", "/", "n" * 4000),
)

_KINDS = (
    *("multipart/form-data", "multipart/form-data; boundary=edge", "multipart/form-data; boundary=", "text/plain"),
    *("application/json", "application/jsonx", "application/x-www-form-urlencoded", "", "multipart/mixed", ";;"),
)


@dataclass(frozen=True, slots=True)
class Upload:
    """One request to ``POST /v1/abilities``; ``story`` says how it came about."""

    story: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False

    def content(self) -> bytes | Iterator[bytes]:
        half = len(self.body) // 2
        return iter([self.body[:half], self.body[half:]]) if self.chunked else self.body


def read_files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mutated(files: Files, random: Random) -> Upload:
    """One upload; which one is decided by ``random`` alone."""
    inner = random.choice(
        [_as_they_are, _bytes_changed, _json_changed, _json_changed, _tensors_changed, _header_changed]
    )
    files = inner(dict(files), random)
    pack = random.choice([_tar, _tar, _zip, _zip, _strange_tar, _strange_zip])
    body = pack(files, random)
    outer = random.choice([_whole] * 6 + [_flipped, _cut, _extended])
    body = outer(body, random)
    send = random.choice([_raw, _raw, _form, _form, _odd_request])
    story = ">".join(step.__name__.strip("_") for step in (inner, pack, outer, send))
    return send(story, body, random)


# --- the files ---


def _as_they_are(files: Files, random: Random) -> Files:
    return files


def _bytes_changed(files: Files, random: Random) -> Files:
    name = random.choice(sorted(files))
    files[name] = random.choice([_flipped, _cut, _extended])(files[name], random)
    return _sealed(files) if random.random() < 0.5 else files


def _json_changed(files: Files, random: Random) -> Files:
    manifest = json.loads(files[MANIFEST_FILE])
    for _ in range(random.choice([1, 1, 1, 3])):
        places = list(_places(manifest))
        where, key = random.choice(places)
        change = random.choice(["replace", "replace", "drop", "more"])
        if change == "drop":
            where.pop(key)
        elif change == "more" and isinstance(where, dict):
            where[random.choice(["x", "\ud800", "", "name", "a" * 3000])] = _odd(random)
        else:
            where[key] = _odd(random)
        if not isinstance(manifest, dict) or not manifest:
            break
    text = json.dumps(manifest)
    if random.random() < 0.1:
        text = random.choice(["[" * 100_000, "[" * 900 + "]" * 900, "null", "[]", "\ufeff" + text, text + text, ""])
    files[MANIFEST_FILE] = text.encode(random.choice(["utf-8", "utf-8", "utf-8", "utf-16"]), "surrogatepass")
    return files


def _tensors_changed(files: Files, random: Random) -> Files:
    tensors = load(files[TENSORS_FILE])
    rows = random.choice(sorted(name for name in tensors if name.endswith(".rows")))
    delta = rows.removesuffix("rows") + "delta"
    changes: list[Callable[[], None]] = [
        lambda: tensors[delta].view(-1).__setitem__(0, float("nan")),
        lambda: tensors[delta].view(-1).__setitem__(-1, float("-inf")),
        lambda: tensors.update({rows: tensors[rows].flip(0).contiguous()}),
        lambda: tensors.update({rows: torch.zeros_like(tensors[rows])}),
        lambda: tensors.update({rows: tensors[rows] + 2**20}),
        lambda: tensors.update({rows: tensors[rows] - 2**20}),
        lambda: tensors.update({rows: tensors[rows].long()}),
        lambda: tensors.update({rows: tensors[rows][:-1].contiguous()}),
        lambda: tensors.update({rows: torch.empty(0, dtype=torch.int32)}),
        lambda: tensors.update({rows: tensors[rows][None].contiguous()}),
        lambda: tensors.update({delta: tensors[delta].to(torch.int8)}),
        lambda: tensors.update({delta: tensors[delta].t().contiguous()}),
        lambda: tensors.update({delta: torch.tensor(1.0)}),
        lambda: tensors.update({delta: tensors[delta].to(torch.float8_e4m3fn)}),
        lambda: tensors.update({delta: tensors[delta].double()}),
        lambda: tensors.update({delta: tensors[delta].to(torch.complex64)}),
        lambda: tensors.update({"another.delta": torch.ones(2, 2)}),
        lambda: tensors.__delitem__(delta),
        lambda: tensors.clear(),
    ]  # fmt: skip
    random.choice(changes)()
    files[TENSORS_FILE] = save(tensors)
    return _sealed(files) if random.random() < 0.9 else files


def _header_changed(files: Files, random: Random) -> Files:
    """The header of the safetensors file: its length, or its JSON."""
    data = files[TENSORS_FILE]
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    where, key = random.choice(list(_places(header)))
    where[key] = random.choice([_odd(random), [0, 2**62], [-1, 4], [8, 4], "F64", "I4"])
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    announced = random.choice([len(text), len(text), 0, 2**40, 2**63, 1])
    files[TENSORS_FILE] = struct.pack("<Q", announced) + text + rest
    return _sealed(files)


def _sealed(files: Files) -> Files:
    """The manifest made to fit the tensors file again, so that what comes after size and hash is reached."""
    try:
        manifest = json.loads(files[MANIFEST_FILE])
        data = files[TENSORS_FILE]
        manifest["counts"]["bytes"] = len(data)
        manifest["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    except (ValueError, KeyError, TypeError):
        return files
    return {**files, MANIFEST_FILE: json.dumps(manifest).encode()}


def _odd(random: Random) -> Any:
    return copy.deepcopy(random.choice(_ODD))  # a later change may be inside it


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


# --- the archive ---


def _tar(files: Files, random: Random) -> bytes:
    return _packed_tar([(_entry(name), data) for name, data in files.items()], random)


def _strange_tar(files: Files, random: Random) -> bytes:
    entries = [(_entry(name), data) for name, data in files.items()]
    odd = _entry(random.choice([MANIFEST_FILE, TENSORS_FILE, EVALUATION_FILE, *_PATHS]))
    odd.type = random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
                              tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"Z"])  # fmt: skip
    odd.linkname = random.choice(["/etc/passwd", "../../x", MANIFEST_FILE, ""])
    data = b"x" * random.choice([0, 10, 2**16])
    kind = random.choice(["odd", "odd", "odd first", "many", "pax", "long", "size", "twice", "none"])
    if kind == "many":
        entries += [(_entry(f"{n}"), b"") for n in range(random.choice([17, 3000]))]
    elif kind == "twice":
        entries += entries[: random.randint(1, len(entries))]
    elif kind == "none":
        entries = []
    elif kind == "pax":
        key = random.choice(["path", "size", "linkpath", "GNU.sparse.map", "GNU.sparse.realsize", "hdrcharset"])
        entries[0][0].pax_headers = {key: random.choice(["-1", "1e9", "9" * 30, "a" * 100_000, "../x", "\0", "1,2"])}
    elif kind == "long":
        entries.insert(0, (_entry("d/" * random.choice([200, 600_000]) + "x"), b""))
    elif kind == "size":
        return _packed_tar(entries, random, announced=random.choice([2**33 - 1, 10**6, 511, 0]))
    else:
        entries.insert(0 if kind == "odd first" else len(entries), (odd, data))
    return _packed_tar(entries, random)


def _entry(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def _packed_tar(entries: list[tuple[tarfile.TarInfo, bytes]], random: Random, announced: int | None = None) -> bytes:
    buffer = io.BytesIO()
    form = random.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as archive:
        for number, (info, data) in enumerate(entries):
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            if announced is not None and number == 0:
                head = tarfile.TarInfo(info.name)
                head.size = announced
                end = buffer.tell()
                buffer.seek(0)
                buffer.write(head.tobuf(tarfile.GNU_FORMAT))
                buffer.seek(end)
    return gzip.compress(buffer.getvalue(), 1)


def _zip(files: Files, random: Random) -> bytes:
    return _packed_zip(list(files.items()), random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def _strange_zip(files: Files, random: Random) -> bytes:
    entries = list(files.items())
    kind = random.choice(["path", "many", "twice", "link", "method", "bomb", "lies", "lies", "encrypted", "empty"])
    if kind == "path":
        entries.append((random.choice(_PATHS), b"x"))
    elif kind == "many":
        entries += [(f"{n}", b"") for n in range(random.choice([17, 3000]))]
    elif kind == "twice":
        entries += entries[: random.randint(1, len(entries))]
    elif kind == "bomb":
        entries.append((EVALUATION_FILE, bytes(random.choice([2_000_000, 20_000_000]))))
    elif kind == "method":
        return _packed_zip(entries, random.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    elif kind == "empty":
        return _packed_zip([], zipfile.ZIP_STORED)
    mode = random.choice([0o120777, 0o020777, 0o040777, 0o010777]) if kind == "link" else 0
    body = bytearray(_packed_zip(entries, zipfile.ZIP_DEFLATED, mode))
    if kind == "lies":  # a number of the directory: sizes, offsets, counts
        start = body.rfind(b"PK\x01\x02")
        at = random.randrange(start, len(body) - 4)
        body[at : at + 4] = struct.pack("<I", random.choice([0, 1, 2**31, 2**32 - 1, random.getrandbits(32)]))
    elif kind == "encrypted":
        body[6] |= 1
        body[body.find(b"PK\x01\x02") + 8] |= 1
    return bytes(body)


def _packed_zip(entries: list[tuple[str, bytes]], method: int, mode: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode())
            info.external_attr = mode << 16
            archive.filelist[:] = [kept for kept in archive.filelist if kept.filename != name] + [
                kept for kept in archive.filelist if kept.filename == name
            ]
            archive.NameToInfo.pop(info.filename, None)  # no warning of a name that is there twice
            archive.writestr(info, data, compress_type=method)
    return buffer.getvalue()


# --- the bytes, and the request ---


def _whole(body: bytes, random: Random) -> bytes:
    return body


def _flipped(body: bytes, random: Random) -> bytes:
    data = bytearray(body)
    for _ in range(random.choice([1, 1, 8, 64])):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _cut(body: bytes, random: Random) -> bytes:
    return body[: random.randrange(len(body) + 1)]


def _extended(body: bytes, random: Random) -> bytes:
    return body + random.choice([b"\0", bytes(1024), random.randbytes(100), body])


def _raw(story: str, body: bytes, random: Random) -> Upload:
    return Upload(story, body, chunked=random.random() < 0.3)


def _form(story: str, body: bytes, random: Random) -> Upload:
    name, file = random.choice(["archive", "", "x" * 300]), random.choice(["a.zip", "../../a", "é", ""])
    head = f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="{file}"\r\n\r\n'.encode()
    return Upload(story, head + body + b"\r\n--edge--\r\n", {"content-type": "multipart/form-data; boundary=edge"})


def _odd_request(story: str, body: bytes, random: Random) -> Upload:
    kind = random.choice(_KINDS)
    form = _form(story, body, random).body
    form = random.choice([form, _cut(form, random), _flipped(form, random), body, b"--edge--\r\n", form + form])
    return Upload(f"{story} as {kind!r}", form, {"content-type": kind})
