"""Re-measures what the published abilities do, with 95 % bootstrap intervals, and prints it as tables.

    python -m benchmarks.ability_quality --json quality.json                     # everything
    python -m benchmarks.ability_quality --json quality.json --only pairs,repair
    python -m benchmarks.ability_quality --json quick.json --quick               # 16 items a task: does it run?
    python -m benchmarks.ability_quality --json second.json --seed 1             # other test examples
    python -m benchmarks.ability_quality --json triple.json --only triples --triples 'fr@2*0.5+reason'

Sections: quality (base, source, transfer, delta, retained tasks), general (ARC-easy, PIQA, HellaSwag), pairs and
triples (abilities composed), multilingual (word problems in French under fr@2 + reason), repair (an ability model gets
back what it lost), controls (the transfer, untrained, beside that of random rows, of other abilities' rows, and halved
whole differences). An ability's version is measured if it is the active or the latest one. The numbers of every item
lie beside the JSON file, in FILE.items.json: an interrupted run goes on there, and sections share them. Source models
are measured where the builds' folder has them; else the figure that the artifact stores is shown, marked with *, unless
other test examples were drawn. One that was built again may differ; --rebuilt-sources has it measured, and says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from act_serve.delta.composition import Composition, WeightedAbility
from act_serve.errors import RequestError
from act_serve.home import cache_home
from benchmarks import ability_sections as sections
from benchmarks.ability_bench import Bench, Figure
from benchmarks.ability_controls import controls
from benchmarks.ability_tables import TABLES

QUICK_ITEMS = 16
TRIPLE = "extract+fr+reason"
OF_SOURCES = frozenset({"quality", "repair", "controls"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the sections asked for, prints each one's table, and writes the JSON file after each."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    items = options.items or (QUICK_ITEMS if options.quick else None)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        store=options.store,
        profiles=options.profiles,
        builds=options.work or cache_home() / "builds",
        kept=options.json.with_suffix(".items.json"),
        items=items,
        seed=options.seed,
        rebuilt_sources=options.rebuilt_sources,
    )
    if not bench.profiles:
        raise SystemExit(f"{options.store} holds no ability with a profile in {options.profiles}")
    if OF_SOURCES.intersection(options.only):
        for line in bench.sources_said():
            print(line, flush=True)
    report: Figure = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name, section in _sections(bench, options.triples).items():
        if name in options.only:
            print(f"{name} ...", flush=True)
            start = time.perf_counter()
            figures = section()
            report[name] = {
                "items": items or "as in the profiles",
                "seed": "as in the profiles" if options.seed is None else options.seed,
                "abilities": _versions(bench),
                "seconds": round(time.perf_counter() - start, 1),
                "figures": figures,
            }
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            if figures:
                _show(name, figures)
            else:
                print(f"{name} is empty: {_why_empty(bench, name)}", flush=True)


def _sections(bench: Bench, triples: Sequence[str] | None) -> dict[str, Callable[[], Figure]]:
    known = set(bench.profiles)
    wanted = triples or _default_triple(bench)
    for composition in wanted:
        names = {ability.name for ability in Composition.parse(composition).abilities}
        if unknown := sorted(names - known):
            raise SystemExit(f"{composition}: no ability with a profile is called {' or '.join(unknown)}")
    found: dict[str, Callable[[], Figure]] = {
        "quality": lambda: sections.quality(bench),
        "general": lambda: sections.general(bench),
        "pairs": lambda: sections.pairs(bench),
    }
    if wanted:
        found["triples"] = lambda: sections.triples(bench, wanted)
    if "reason" in known and (bench.store / sections.FRENCH.replace("@", "/")).is_dir():
        found["multilingual"] = lambda: sections.multilingual(bench)
    return {**found, "repair": lambda: sections.repair(bench), "controls": lambda: controls(bench)}


def _default_triple(bench: Bench) -> list[str]:
    """TRIPLE where the store has it, else three abilities that it has; none where there are fewer."""
    wanted = Composition.parse(TRIPLE).abilities
    if all(ability.name in bench.profiles and _in_store(bench, ability) for ability in wanted):
        return [TRIPLE]
    return ["+".join(sorted(bench.profiles)[:3])] if len(bench.profiles) > 2 else []


def _in_store(bench: Bench, ability: WeightedAbility) -> bool:
    return ability.version is None or (bench.store / ability.name / str(ability.version)).is_dir()


def _why_empty(bench: Bench, name: str) -> str:
    if name in OF_SOURCES and not any(map(bench.source, bench.profiles)):
        return "no source model is at hand"
    return "no ability model has lost another ability" if name == "repair" else "there are no two abilities"


def _versions(bench: Bench) -> dict[str, str]:
    return {name: f"{manifest.version}~{manifest.digest}" for name, manifest in bench.manifests.items()}


def _show(name: str, figures: Figure) -> None:
    headings, rows = TABLES[name](figures)
    table = Table(title=name, title_justify="left", box=SIMPLE, padding=(0, 1))
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if Console().is_terminal else 320).print(table)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("abilities"), help="the ability store")
    parser.add_argument("--profiles", type=Path, default=Path("profiles/abilities"), help="the abilities' profiles")
    parser.add_argument("--work", type=Path, help="the builds' folder, for source models; default as build-delta's")
    accept = "accept source models that were built again, so that they may differ"
    parser.add_argument("--rebuilt-sources", action="store_true", help=accept)
    parser.add_argument("--items", type=int, help="examples per task; default what the profiles say, 300 in general")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ITEMS} examples per task")
    parser.add_argument("--seed", type=int, help="of the draw of test examples; default the profiles'")
    parser.add_argument("--only", type=_names, default=tuple(TABLES), help=",".join(TABLES))
    of_triples = f"composition to measure, versions and weights too; repeatable; default {TRIPLE}"
    parser.add_argument("--triples", type=_composition, action="append", help=of_triples)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    return parser.parse_args(arguments)


def _composition(text: str) -> str:
    try:
        Composition.parse(text)
    except RequestError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return text


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in TABLES]:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; there are {', '.join(TABLES)}")
    return names


if __name__ == "__main__":
    main()
