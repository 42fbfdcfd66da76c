"""What act-serve warns of in an engine's process is written, whatever vLLM's app does to the root logger."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from act_serve.engine.log import share_log


@pytest.fixture
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    """vLLM's and ours with nothing set, below a root logger at ERROR; as they were afterwards."""
    some = [logging.getLogger(), logging.getLogger("vllm"), logging.getLogger("act_serve")]
    former = [(logger.level, logger.handlers, logger.propagate) for logger in some]
    for logger, level in zip(some, (logging.ERROR, logging.NOTSET, logging.NOTSET), strict=True):
        logger.setLevel(level)
        logger.handlers = []
        logger.propagate = True  # else pytest gives it handlers of its own
    yield some[1], some[2]
    for logger, (level, handlers, propagate) in zip(some, former, strict=True):
        logger.setLevel(level)
        logger.handlers, logger.propagate = handlers, propagate


@pytest.mark.parametrize(("level", "lines"), [("INFO", 1), ("ERROR", 0)])
def test_warnings_are_written_once_at_vllms_level(
    loggers: tuple[logging.Logger, logging.Logger], level: str, lines: int
) -> None:
    vllm, _ = loggers
    written = io.StringIO()
    vllm.addHandler(logging.StreamHandler(written))
    vllm.setLevel(level)
    share_log()
    share_log()
    logging.getLogger("act_serve.abilities.mirror").warning("the store is away")
    assert written.getvalue().count("the store is away") == lines


def test_logging_that_is_left_to_the_operator_stays(loggers: tuple[logging.Logger, logging.Logger]) -> None:
    _, ours = loggers
    share_log()
    assert (ours.level, ours.handlers) == (logging.NOTSET, [])
