"""One line that says what is going on: kept up to date on a terminal, repeated now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

_LOG_PERIOD_S = 5.0
_TERMINAL_PERIOD_S = 0.2
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class ProgressLine:
    """Shows the latest word with the seconds since the start, until :meth:`done`.

    A thread of its own redraws it, so that it lives on while the main thread waits for something slow.
    """

    def __init__(self) -> None:
        self._out = sys.stderr
        self._terminal = self._out.isatty()
        self._start = time.monotonic()
        self._word = ""
        self._ended = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)

    def __enter__(self) -> ProgressLine:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._changed.set()
        self._thread.join()

    def say(self, word: str) -> None:
        """What is going on now; a repetition changes nothing."""
        if word != self._word:
            self._word = word
            self._changed.set()

    def done(self, word: str) -> None:
        """The last word for now; the line goes still until the next :meth:`say`."""
        self._word = ""
        print(f"\r\x1b[K{word}" if self._terminal else word, file=self._out, flush=True)

    def _draw(self) -> None:
        frame = 0
        while not self._ended.is_set():
            if self._word:
                text = f"{time.monotonic() - self._start:4.0f} s  {self._word}"
                frame = (frame + 1) % len(_FRAMES)
                shown = f"\r\x1b[K{_FRAMES[frame]} {text}" if self._terminal else f"{text}\n"
                print(shown, end="", file=self._out, flush=True)
            self._changed.wait(_TERMINAL_PERIOD_S if self._terminal else _LOG_PERIOD_S)
            self._changed.clear()
        if self._terminal:
            print("\r\x1b[K", end="", file=self._out, flush=True)
