"""Where act-serve keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "ACT_SERVE_HOME"


def cache_home() -> Path:
    """The user's folder for converted models, data, mirrored stores and unfinished builds: `$ACT_SERVE_HOME` or under
    the cache."""
    named = os.environ.get(HOME_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "act-serve"
