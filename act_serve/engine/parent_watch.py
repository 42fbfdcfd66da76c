"""Ends an engine process whose parent was killed: nobody else would, and it would keep its memory for ever."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it through multiprocessing has died.

    Does nothing where it was started otherwise, as a shell that ends must not take a server with it.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), name="parent-watch", daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    # At once: what waits for the parent's answers would hold up an orderly end.
    os._exit(1)
