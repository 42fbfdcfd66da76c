"""The benchmark's floors on the held-out prompts; its times are for a quiet machine to judge."""

from __future__ import annotations

import json
from pathlib import Path

from act_serve.abilities.skills import Skills, background, fit_skills
from benchmarks.auto_accuracy import DATA, FLOORS, PROFILES, Prompt, measure, profiles_view, read_prompts, table

VIEW = profiles_view(PROFILES)


def test_the_floors_hold_on_prompts_that_nothing_was_fitted_on() -> None:
    prompts = read_prompts(DATA)
    report, wrong = measure(prompts, VIEW, fit_skills(VIEW))
    assert report.prompts == len(prompts) >= 400
    assert report.right >= FLOORS["right"], wrong
    assert report.false_choices <= FLOORS["false_choices"], wrong


def test_no_held_out_prompt_is_fitted_on() -> None:
    fitted = {text.casefold() for m in VIEW.manifests() for text in m.exemplars} | {t.casefold() for t in background()}
    # A greeting is a greeting; whatever is longer must not be in both.
    assert [p.text for p in read_prompts(DATA) if len(p.text.split()) > 3 and p.text.casefold() in fitted] == []


def test_a_file_of_ones_own_is_scored_and_confusions_are_counted(tmp_path: Path) -> None:
    lines = [{"prompt": "Il pleut ce soir.", "abilities": ["fr"]}, {"prompt": "Il pleut ce soir.", "abilities": []}]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    prompts = read_prompts(file)
    assert prompts[0] == Prompt("Il pleut ce soir.", ("fr",))
    report, wrong = measure(prompts, VIEW, Skills())
    assert (report.right, report.false_choices, report.out_of_domain) == (0.5, 1.0, 1)
    assert report.confusion == {"fr": {"fr": 1}, "none": {"fr": 1}}
    assert wrong[0][0] is prompts[1]
    assert not report.passed
    assert "| none | 1 |" in table(report)
