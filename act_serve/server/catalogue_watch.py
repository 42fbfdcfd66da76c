"""Keeps a router's catalogue up to date without a request ever waiting for it, save one that names something new."""

from __future__ import annotations

import asyncio
import logging
import time

from act_serve.abilities.catalogue import Catalogue, CatalogueView
from act_serve.abilities.skills import Skills
from act_serve.errors import StoreError
from act_serve.server.skill_watch import SkillWatch

_log = logging.getLogger(__name__)


class CatalogueWatch:
    """Reads the store again and again, always in a thread.

    Args:
        catalogue: to keep up to date.
        period_s: between two readings; requests for unknown names cause at most one more in that time.
        skills: follows what each reading finds.
    """

    def __init__(self, catalogue: Catalogue, period_s: float, skills: SkillWatch) -> None:
        self._catalogue, self._period_s, self._skills = catalogue, period_s, skills
        self._looking = asyncio.Lock()
        self._looked = float("-inf")

    @property
    def view(self) -> CatalogueView:
        """What the last reading found."""
        return self._catalogue.view

    @property
    def skills(self) -> Skills:
        """The classifier of skills that was fitted last."""
        return self._skills.skills

    async def refresh(self) -> None:
        """Reads the store; where that fails, the catalogue stays as it was and the log says why."""
        try:
            await asyncio.to_thread(self._catalogue.refresh)
        except (StoreError, OSError) as exc:
            _log.warning("the ability store cannot be read, so the catalogue stays as it was: %s", exc)
        self._skills.follow(self.view)

    async def run(self) -> None:
        """Refreshes for ever."""
        while True:
            await asyncio.sleep(self._period_s)
            await self.refresh()

    async def look_again(self) -> bool:
        """For a name that is not in the view: whether the view may have it now."""
        asked = time.monotonic()
        async with self._looking:
            if self._looked < asked:  # else another request has just done it
                if asked < self._looked + self._period_s:
                    return False
                await self.refresh()
                self._looked = time.monotonic()
        return True
