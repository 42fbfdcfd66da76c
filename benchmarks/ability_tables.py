"""The sections of `benchmarks/ability_quality.py` as rows of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.ability_bench import Figure
from benchmarks.ability_sections import FRENCH

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]


def score(found: Figure | None) -> str:
    """A score with its interval, or one that the artifact stores (*)."""
    if found is None:
        return "-"
    if "low" not in found:
        return f"{found['score']:.4g}*"
    return f"{found['score']:.4g} [{found['low']:.4g}, {found['high']:.4g}]"


def percent(found: Figure | None) -> str:
    """A share with its interval; * where it is against a stored figure."""
    if found is None:
        return "-"
    if "low" not in found:
        return f"{found['value']:.1%}*"
    return f"{found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def change(found: Figure) -> str:
    """A difference with its interval."""
    return f"{found['value']:+.4g} [{found['low']:+.4g}, {found['high']:+.4g}]"


def _quality(figures: Figure) -> Rows:
    rows: list[tuple[str, ...]] = []
    for name, ability in figures.items():
        said = f"{name} {ability['bytes'] / 1e6:.1f} MB p={ability['p']}{_rebuilt(ability)}"
        for task in ability["tasks"]:
            parts = (score(task.get(variant)) for variant in ("base", "source", "transfer", "delta"))
            rows.append((said, task["task"], str(task["items"]), *parts, percent(task.get("share_kept"))))
        for task in ability["retained"]:
            parts = (score(task.get(variant)) for variant in ("base", "source", "transfer", "delta"))
            rows.append((said, f"keeps {task['task']}", str(task["items"]), *parts, f"drop {percent(task['drop'])}"))
    return ("ability", "task", "items", "base", "source", "transfer", "delta", "share kept"), rows


def _rebuilt(found: Figure) -> str:
    return " (source: rebuilt)" if found["source"] == "rebuilt" else ""


def _general(figures: Figure) -> Rows:
    return ("abilities", "suite", "items", "accuracy", "change", "in the base's interval"), [
        (name, suite, str(found["items"]), score(found), *_beside_base(found))
        for name, suites in figures.items()
        for suite, found in suites.items()
    ]


def _beside_base(found: Figure) -> tuple[str, str]:
    if "change" not in found:
        return "", ""
    return change(found["change"]), "yes" if found["within_interval_of_base"] else "NO"


def _composed(figures: Figure) -> Rows:
    return ("composition", "task", "items", "base", "alone", "together", "share of own gain"), [
        (
            _with_conflict(composition, section),
            task["task"],
            str(task["items"]),
            *(score(task[variant]) for variant in ("base", "alone", "together")),
            percent(task["share_kept"]),
        )
        for composition, section in figures.items()
        for tasks in section["abilities"].values()
        for task in tasks
    ]


def _with_conflict(composition: str, section: Figure) -> str:
    clash = section.get("conflict")
    return f"{composition} (rows shared {clash['share']:.0%}, cosine {clash['cosine']})" if clash else composition


def _multilingual(figures: Figure) -> Rows:
    alone = ("base", FRENCH, "reason")
    return ("composition", "task", "items", *alone, "composed", *(f"against {each}" for each in alone)), [
        (
            composition,
            name,
            str(task["items"]),
            *(score(task[each]) for each in alone),
            score(composed),
            *(change(composed["minus"][each]) for each in alone),
        )
        for name, task in figures.items()
        for composition, composed in task["composed"].items()
    ]


def _repair(figures: Figure) -> Rows:
    return ("repair", "task", "items", "base", "specialised", "repaired", "recovered", "of base + delta"), [
        row for title, section in figures.items() for row in _repaired(f"{title}{_rebuilt(section)}", section)
    ]


def _repaired(title: str, section: Figure) -> Iterable[tuple[str, ...]]:
    for task in section["lost"]:
        parts = (score(task[variant]) for variant in ("base", "specialised", "repaired"))
        yield title, task["task"], str(task["items"]), *parts, percent(task["recovered"]), percent(task["of_skill"])
    for task in section["own"]:
        parts = (score(task[variant]) for variant in ("specialised", "repaired"))
        yield title, f"keeps {task['task']}", str(task["items"]), "", *parts, f"drop {percent(task['drop'])}", ""


def _controls(figures: Figure) -> Rows:
    headings = ("ability", "differences", "parameters", "task", "items", "base", "source", "result")
    return (*headings, "share kept", "minus own rows"), [
        *(row for name, ability in figures["rows"].items() for row in _other_rows(name, ability)),
        *(
            _whole_halved(pair, f"{name}{_rebuilt(figures['rows'][name])}", task)
            for pair, abilities in figures["halved"].items()
            for name, tasks in abilities.items()
            for task in tasks
        ),
    ]


def _other_rows(name: str, ability: Figure) -> Iterable[tuple[str, ...]]:
    for task in ability["tasks"]:
        said = f"{name}{_rebuilt(ability)}"
        asked = (task["task"], str(task["items"]), score(task["base"]), score(task.get("source")))
        for variant, found in task["rows_of"].items():
            parameters = f"{ability['parameters'][variant]:,}"
            kept = percent(found["share_kept"]) if "source" in task else f"drop {percent(found['drop'])}"
            yield said, f"in {variant} rows", parameters, *asked, score(found), kept, change(found["minus_own"])
        yield said, "in random rows, mean", "", *asked, f"{task['random_mean']:.4g}", "", ""


def _whole_halved(pair: str, name: str, task: Figure) -> tuple[str, ...]:
    asked = (task["task"], str(task["items"]), score(task["base"]), score(task["source"]))
    return name, f"{pair}, each whole, halved", "", *asked, score(task["halved"]), percent(task["share_kept"]), ""


TABLES: dict[str, Callable[[Figure], Rows]] = {
    "quality": _quality,
    "general": _general,
    "pairs": _composed,
    "triples": _composed,
    "multilingual": _multilingual,
    "repair": _repair,
    "controls": _controls,
}
