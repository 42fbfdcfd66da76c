"""Archives from strangers: an ability's files or an error, and nothing outside the folder."""

from __future__ import annotations

import gzip
import io
import os
import random
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from act_serve.abilities.archive import unpack
from act_serve.abilities.source import fetch
from act_serve.delta.manifest import EVALUATION_FILE, MANIFEST_FILE, TENSORS_FILE
from act_serve.errors import ArchiveError, TooLargeError

CONTENT = {
    MANIFEST_FILE: b'{"name": "fr"}',
    TENSORS_FILE: random.Random(0).randbytes(300_000),
    EVALUATION_FILE: b"[]" * 2000,
}
Pack = Callable[[Mapping[str, bytes]], bytes]


def as_zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def as_tar(files: Mapping[str, bytes]) -> bytes:
    return tar_of(*((tarfile.TarInfo(name), data) for name, data in files.items()))


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1, format=form) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(name: str, mode: int, data: bytes = b"x") -> bytes:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    buffer = io.BytesIO(as_zip(CONTENT))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(info, data)
    return buffer.getvalue()


def tar_with(name: str, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return tar_of((info, b""), *((tarfile.TarInfo(n), d) for n, d in CONTENT.items()))


def unpacked(data: bytes, folder: Path, max_bytes: int = 10**6) -> dict[str, bytes]:
    unpack(io.BytesIO(data), folder, max_bytes)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("pack", [as_zip, as_tar])
@pytest.mark.parametrize("place", ["", "./", "fr/", "1/"])
def test_the_files_arrive_whole_from_the_top_or_from_one_folder(tmp_path: Path, pack: Pack, place: str) -> None:
    assert unpacked(pack({place + name: data for name, data in CONTENT.items()}), tmp_path) == CONTENT


def test_the_evaluation_may_be_missing_and_folders_may_be_listed(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("fr")
    folder.type = tarfile.DIRTYPE
    files = {f"fr/{name}": CONTENT[name] for name in (MANIFEST_FILE, TENSORS_FILE)}
    data = tar_of((folder, b""), *((tarfile.TarInfo(n), d) for n, d in files.items()))
    assert unpacked(data, tmp_path).keys() == {MANIFEST_FILE, TENSORS_FILE}


BAD = {
    "an upper folder in a zip": (as_zip({**CONTENT, "../evil": b"x"}), "leads out"),
    "an upper folder in a tar": (as_tar({**CONTENT, f"fr/../../{MANIFEST_FILE}": b"x"}), "leads out"),
    "an absolute path": (as_tar({f"/{MANIFEST_FILE}": b"x"}), "leads out"),
    "a drive": (as_zip({f"c:{MANIFEST_FILE}": b"x"}), "leads out"),
    "a backslash": (as_tar({f"..\\{MANIFEST_FILE}": b"x"}), "leads out"),
    "a symbolic link": (tar_with(MANIFEST_FILE, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    "a hard link": (tar_with(MANIFEST_FILE, type=tarfile.LNKTYPE, linkname="/etc/passwd"), "a link"),
    "a link in a zip": (zip_of("link", stat.S_IFLNK | 0o777, b"/etc/passwd"), "a link"),
    "a device": (tar_with("zero", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "a device"),
    "a device in a zip": (zip_of("zero", stat.S_IFBLK), "a device"),
    "a pipe": (tar_with("pipe", type=tarfile.FIFOTYPE), "a device"),
    "a pickle": (as_zip({**CONTENT, "model.pkl": b"x"}), "is not one of"),
    "code": (as_tar({**CONTENT, "fr/setup.py": b"x"}), "is not one of"),
    "a deep folder": (as_zip({f"a/b/{MANIFEST_FILE}": b"x"}), "is not one of"),
    "two abilities": (as_zip({f"{n[0]}/{n}": d for n, d in CONTENT.items()}), "several folders"),
    "a name twice": (as_tar({**CONTENT, f"fr/{MANIFEST_FILE}": b"x"}), "twice"),
    "no tensors": (as_zip({MANIFEST_FILE: b"x"}), f"no {TENSORS_FILE}"),
    "nothing": (as_zip({}), f"no {MANIFEST_FILE} and no"),
    "many folders": (as_zip({f"{n}/": b"" for n in range(99)}), "more than 16"),
    "lzma in a zip": (b"", "unusual way"),
    "a plain tar": (gzip.decompress(as_tar(CONTENT)), "neither a zip nor a tar.gz"),
    "no archive": (b"hello", "neither a zip nor a tar.gz"),
    "an empty body": (b"", "neither a zip nor a tar.gz"),
    "half a zip": (as_zip(CONTENT)[:9000], "damaged"),
    "half a tar": (as_tar(CONTENT)[:9000], "damaged"),
    "a gzip of no tar": (gzip.compress(b"hello" * 999), "damaged"),
    "a huge zip directory": (as_zip({f"{n:0100}": b"" for n in range(9000)}), "headers are larger"),
    "a huge tar header": (tar_with("a" * 5_000_000), "headers are larger"),
    "a huge comment": (tar_with(MANIFEST_FILE, pax_headers={"comment": "a" * 5_000_000}), "headers are larger"),
}
_lzma = io.BytesIO()
with zipfile.ZipFile(_lzma, "w", zipfile.ZIP_LZMA) as _archive:
    _archive.writestr(MANIFEST_FILE, b"x")
BAD["lzma in a zip"] = (_lzma.getvalue(), "unusual way")


@pytest.mark.parametrize("what", BAD)
def test_anything_else_is_refused_with_its_own_message(tmp_path: Path, what: str) -> None:
    data, message = BAD[what]
    inner = tmp_path / "in"
    inner.mkdir()
    with pytest.raises(ArchiveError, match=message):
        unpacked(data, inner)
    assert os.listdir(tmp_path) == ["in"]
    assert not any(path.is_symlink() or not path.is_file() for path in inner.iterdir())


@pytest.mark.parametrize("pack", [as_zip, as_tar])
def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, pack: Pack) -> None:
    bomb = pack({**CONTENT, TENSORS_FILE: bytes(50_000_000)})
    assert len(bomb) < 1_000_000
    with pytest.raises(TooLargeError, match=TENSORS_FILE):
        unpacked(bomb, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 100_000
    manifest_bomb = pack({MANIFEST_FILE: bytes(20_000_000)})
    (tmp_path / "other").mkdir()
    with pytest.raises(TooLargeError, match=MANIFEST_FILE):
        unpacked(manifest_bomb, tmp_path / "other", 10**9)


def test_a_zip_that_lies_about_a_size_is_refused(tmp_path: Path) -> None:
    data = bytearray(as_zip({TENSORS_FILE: bytes(5_000_000)}))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = data.index(signature) + offset
        data[at : at + 4] = (1000).to_bytes(4, "little")
    with pytest.raises(ArchiveError):
        unpacked(bytes(data), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1001


_ORIGINALS = {
    "zip": as_zip({**CONTENT, TENSORS_FILE: b"t" * 3000}),
    "tar": gzip.decompress(as_tar({**CONTENT, TENSORS_FILE: b"t" * 3000})),
}


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(["zip", "tar", "tar.gz"]),
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=8)), max_size=6),
    cut=st.none() | st.integers(0, 2**16),
    extra=st.binary(max_size=40),
)
def test_damaged_archives_give_files_or_an_error_of_ours(
    kind: str, edits: list[tuple[int, bytes]], cut: int | None, extra: bytes
) -> None:
    data = bytearray(_ORIGINALS[kind.removesuffix(".gz")])
    if kind == "tar.gz":
        data = bytearray(gzip.compress(data))
    for place, change in edits:
        at = place % len(data)
        data[at : at + len(change)] = change
    data = data[:cut] + extra
    if kind == "tar":
        data = bytearray(gzip.compress(data))
    with tempfile.TemporaryDirectory() as outer:
        inner = Path(outer, "in")
        inner.mkdir()
        try:
            files = unpacked(bytes(data), inner)
        except (ArchiveError, TooLargeError):
            files = {}
        assert files.keys() <= CONTENT.keys()
        assert os.listdir(outer) == ["in"]


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=2000), magic=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08\x00"]))
def test_noise_is_refused(data: bytes, magic: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ArchiveError):
        unpacked(magic + data, Path(folder))


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    root = tmp_path / "allowed"
    (root / "fr").mkdir(parents=True)
    for name, data in CONTENT.items():
        (root / "fr" / name).write_bytes(data)
    (root / "fr.zip").write_bytes(as_zip(CONTENT))
    (root / "fr" / "README.md").write_text("not an ability's file")
    (tmp_path / "out").mkdir()
    return root


@pytest.mark.parametrize("source", ["{}/fr", "file://{}/fr", "file://localhost{}/fr/", "{}/fr.zip", "{}/x/../fr"])
def test_folders_and_archives_under_an_allowed_folder_are_fetched(tmp_path: Path, allowed: Path, source: str) -> None:
    fetch(source.format(allowed), [tmp_path / "none", allowed], tmp_path / "out", 10**6)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == CONTENT


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://127.0.0.1/fr.zip", "allowed_sources, or upload"),
        ("https://169.254.169.254/latest", "allowed_sources, or upload"),
        ("s3://bucket/fr", "allowed_sources, or upload"),
        ("file://elsewhere/fr", "allowed_sources, or upload"),
        ("//elsewhere/fr", "allowed_sources"),
        ("allowed/fr", "does not lie under"),
        ("{}/../secret", "does not lie under"),
        ("file://{}/%2e%2e/secret", "does not lie under"),
        ("{}/link", "does not lie under"),
        ("{}-evil/fr", "does not lie under"),
        ("/etc/passwd", "does not lie under"),
        ("", "does not lie under"),
        ("{}/a\0b", "not a path"),
        ("{}/loop", "not a path|cannot be read|does not lie"),
        ("{}/none", "cannot be read: No such file"),
        ("{}/pipe", "not a plain file"),
        ("{}/inner", "cannot be read"),
        ("http://[", "not a path"),
    ],
)
def test_everything_else_is_refused(tmp_path: Path, allowed: Path, source: str, message: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / MANIFEST_FILE).write_text("{}")
    (tmp_path / "allowed-evil").mkdir()
    (allowed / "link").symlink_to(tmp_path / "secret")
    (allowed / "loop").symlink_to(allowed / "loop")
    (allowed / "inner").mkdir()
    (allowed / "inner" / MANIFEST_FILE).symlink_to(tmp_path / "secret" / MANIFEST_FILE)
    os.mkfifo(allowed / "pipe")
    with pytest.raises(ArchiveError, match=message):
        fetch(source.format(allowed), [allowed], tmp_path / "out", 10**6)
    assert os.listdir(tmp_path / "out") == []


def test_a_folder_over_the_limit_is_refused(tmp_path: Path, allowed: Path) -> None:
    with pytest.raises(TooLargeError):
        fetch(str(allowed / "fr"), [allowed], tmp_path / "out", 100_000)
