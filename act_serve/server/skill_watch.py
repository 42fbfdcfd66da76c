"""Keeps the classifier of skills fitted to the catalogue, in the background: no request waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from act_serve.abilities.catalogue import CatalogueView
from act_serve.abilities.detect import NOT_READY
from act_serve.abilities.skills import Key, Skills, fit_skills, skills_key

_log = logging.getLogger(__name__)


class SkillWatch:
    """Fits in a thread, one fit at a time; the former classifier stays until the next one is ready.

    Args:
        fit: makes a classifier for a catalogue.
    """

    def __init__(self, fit: Callable[[CatalogueView], Skills] = fit_skills) -> None:
        self._fit = fit
        self._skills = NOT_READY
        self._tried: Key | None = None
        self._fitting: asyncio.Task[None] | None = None

    @property
    def skills(self) -> Skills:
        """The newest classifier; before the first, one that chooses nothing."""
        return self._skills

    def follow(self, view: CatalogueView) -> None:
        """Starts a fit if what skills are told by has changed; while one runs, the next call sees to it."""
        key = skills_key(view)
        if key == self._tried or (self._fitting is not None and not self._fitting.done()):
            return
        self._tried = key
        self._fitting = asyncio.create_task(self._replace(view))

    async def settled(self) -> None:
        """Waits for the fit that is running, if any."""
        if self._fitting is not None:
            await asyncio.wait({self._fitting})

    async def _replace(self, view: CatalogueView) -> None:
        try:
            self._skills = await asyncio.to_thread(self._fit, view)
        except Exception:  # whatever is in the manifests, choosing by language goes on
            _log.exception("the classifier of skills cannot be fitted to this catalogue, so it stays as it was")
