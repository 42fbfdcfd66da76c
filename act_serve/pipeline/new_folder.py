"""Writes a folder so that it appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from act_serve.errors import ModelError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, which takes its name when the context ends without an error.

    Raises ModelError when `folder` exists already or the disk refuses.
    """
    if folder.exists():
        raise ModelError(f"{folder} exists already; name a folder that does not")
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(folder)
    except (OSError, SafetensorError) as exc:
        raise ModelError(f"{folder} can't be written: {exc}; nothing of it was kept") from exc
    finally:
        shutil.rmtree(staging, ignore_errors=True)
