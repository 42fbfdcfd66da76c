from __future__ import annotations

import asyncio
import threading

import pytest

from act_serve.abilities.catalogue import AbilityEntry, CatalogueView, VersionEntry
from act_serve.abilities.detect import NOT_READY, choose
from act_serve.abilities.skills import Skills, skills_key
from act_serve.server.skill_watch import SkillWatch
from tests.abilities.manifests import WORD_PROBLEMS, manifest


def view(*names: str) -> CatalogueView:
    manifests = [manifest(name, kind="skill", exemplars=WORD_PROBLEMS) for name in names]
    return CatalogueView({m.name: AbilityEntry(m.name, (VersionEntry(m.version, m),)) for m in manifests})


async def test_it_fits_again_when_the_catalogue_changes_and_only_then() -> None:
    fits: list[CatalogueView] = []

    def fit(seen: CatalogueView) -> Skills:
        fits.append(seen)
        return Skills(skills_key(seen))

    watch = SkillWatch(fit)
    for seen in (view("a"), view("a"), view("a", "b"), view("a", "b"), view("b")):
        watch.follow(seen)
        await watch.settled()
        assert watch.skills.key == skills_key(seen)
    assert [list(seen.entries) for seen in fits] == [["a"], ["a", "b"], ["b"]]


async def test_nothing_waits_for_a_fit_and_one_runs_at_a_time() -> None:
    gate, fits = threading.Event(), 0

    def fit(seen: CatalogueView) -> Skills:
        nonlocal fits
        fits += 1
        gate.wait(30)
        return Skills(skills_key(seen))

    watch = SkillWatch(fit)
    watch.follow(view("a"))
    await asyncio.sleep(0.05)
    watch.follow(view("b"))
    assert watch.skills is NOT_READY
    assert "yet" in choose("How many minutes are 3 hours?", view("a"), skills=watch.skills).reason
    gate.set()
    await watch.settled()
    assert (fits, watch.skills.key) == (1, skills_key(view("a")))
    watch.follow(view("b"))
    await watch.settled()
    assert (fits, watch.skills.key) == (2, skills_key(view("b")))


async def test_a_fit_that_fails_is_logged_once_and_the_former_one_stays(caplog: pytest.LogCaptureFixture) -> None:
    def fit(seen: CatalogueView) -> Skills:
        if "bad" in seen.entries:
            raise ValueError("no words at all")
        return Skills(skills_key(seen))

    watch = SkillWatch(fit)
    for seen in (view("a"), view("a", "bad"), view("a", "bad")):
        watch.follow(seen)
        await watch.settled()
    assert watch.skills.key == skills_key(view("a"))
    assert caplog.text.count("cannot be fitted") == 1
    assert "no words at all" in caplog.text
    watch.follow(view("b"))
    await watch.settled()
    assert watch.skills.key == skills_key(view("b"))


async def test_language_is_chosen_after_a_fit_that_failed() -> None:
    def fit(_: CatalogueView) -> Skills:
        raise ImportError("scikit-learn")

    fr = manifest("fr", kind="language", languages=("fr",))
    seen = CatalogueView({"fr": AbilityEntry("fr", (VersionEntry(1, fr),))})
    watch = SkillWatch(fit)
    watch.follow(seen)
    await watch.settled()
    choice = choose("Quelle est la capitale de la France ?", seen, skills=watch.skills)
    assert [a.name for a in choice.abilities] == ["fr"]
