"""Obtains the files of a Debian package without installing it."""

import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from act_serve.errors import DataError
from act_serve.home import HOME_VARIABLE, cache_home

FOLDER_VARIABLE = "ACT_SERVE_DATA"


def unpacked_package(package: str, probe: str) -> Path:
    """Returns a folder under which the files of `package` lie as they would under `/`.

    `probe` is a path inside the package, relative to `/`, that proves that the folder is the right one. Tried in
    this order: `$ACT_SERVE_DATA/<package>`, `$ACT_SERVE_DATA`, the running system, the cache, `apt-get download`.
    Raises DataError with what to do when none of them has it, or the cache can't be written.
    """
    cached = cache_home() / "datasets" / package
    named = os.environ.get(FOLDER_VARIABLE)
    candidates = [Path(named) / package, Path(named)] if named else []
    for folder in [*candidates, Path("/"), cached]:
        if (folder / probe).exists():
            return folder
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(cached) + ".lock"):
            if not (cached / probe).exists():
                _download(package, cached)
    except OSError as exc:
        raise DataError(
            f"the data of {package} could not be kept in {cached}: {exc}; make room, or name another folder with "
            f"{HOME_VARIABLE}=FOLDER"
        ) from exc
    if not (cached / probe).exists():
        raise DataError(f"the Debian package {package} has no {probe}. {_advice(package)}")
    return cached


def _download(package: str, folder: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError(f"the data of {package} is not on this machine, and it is no Debian. {_advice(package)}")
    staging = folder.with_name(f".{package}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        _run(["apt-get", "download", package], staging, package)
        archive = next(staging.glob("*.deb"))
        _run(["dpkg-deb", "-x", archive.name, "files"], staging, package)
        shutil.rmtree(folder, ignore_errors=True)
        (staging / "files").rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _run(command: list[str], folder: Path, package: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise DataError(f"`{' '.join(command)}` failed: {' '.join(reason)}. {_advice(package)}")


def _advice(package: str) -> str:
    return (
        f"On Debian or Ubuntu run `apt-get update` and try again; elsewhere unpack the package {package} by hand "
        f"(`ar x`, `tar xf data.tar.*`) and name the folder that then holds `usr/`: {FOLDER_VARIABLE}=FOLDER."
    )
