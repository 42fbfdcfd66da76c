"""The section `controls` of `benchmarks/ability_quality.py`: what other rows do with a source model's differences."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from act_serve.delta.artifact import as_stored
from act_serve.models.families import channel_modules
from act_serve.pipeline.measured import difference
from benchmarks.ability_bench import Bench, Figure, fallen, figure, gain_kept, name_of, ranked_rows, scored, transferred
from benchmarks.ability_sections import asked, stored_deltas

RANDOM_SEEDS = (0, 1, 2)


def controls(bench: Bench) -> Figure:
    """Is it these rows? The source's differences, untrained, in the profile's rows and in others; and whole, halved.

    Only for abilities whose source model is at hand.
    """
    sources = {name: source for name in bench.profiles if (source := bench.source(name))}
    if not sources:
        return {}
    return {
        "rows": {name: _other_rows(bench, name, source) for name, source in sources.items()},
        "halved": {
            f"{left}+{right}": _halved(bench, sources, (left, right)) for left, right in combinations(sources, 2)
        },
    }


def _other_rows(bench: Bench, name: str, source: Path) -> Figure:
    """The ability's differences in the profile's rows, in random ones, and in those of the other abilities."""
    profile, own, retained = bench.profiles[name], bench.own(name), bench.retained(name)
    base, whole = bench.measure("", [*own, *retained]), bench.measure("", own, model=source)
    parameters, results = {}, {}
    for variant, rows in _masks(bench, name, source).items():
        deltas = as_stored(transferred(profile, rows, base=bench.base, source=source), profile.stored)
        parameters[variant] = sum(each.delta.numel() for each in deltas.values())
        results[variant] = bench.measure_deltas(f"{name} in rows of: {variant}", deltas, [*own, *retained])
    drawn = [results[_drawn(seed)] for seed in RANDOM_SEEDS]
    return {
        "source": bench.source_state(name),
        "parameters": parameters,
        "tasks": [
            {
                **asked(question),
                "base": scored(base[task]),
                **({"source": scored(whole[task])} if task in whole else {}),
                "random_mean": round(sum(found[task].score for found in drawn) / len(drawn), 5),
                "rows_of": {
                    variant: {
                        **scored(found[task]),
                        "share_kept": gain_kept(base[task], whole[task], found[task]) if task in whole else None,
                        "drop": None if task in whole else fallen(base[task], found[task]),
                        "minus_own": figure(*difference(found[task], results["own"][task])),
                    }
                    for variant, found in results.items()
                },
            }
            for question in (*own, *retained)
            for task in (question.task.name,)
        ],
    }


def _masks(bench: Bench, name: str, source: Path) -> dict[str, dict[str, Tensor]]:
    """Rows by whose they are: `own` by the profile's ranking, `random 0`, and those of the other abilities as stored.

    An ability with more parameters than the profile's rows lends as many, drawn by chance; one with fewer, all.
    """
    profile = bench.profiles[name]
    wanted = {"own": (profile.localize.ranking, profile.seed)}
    wanted |= {_drawn(seed): ("random", seed) for seed in RANDOM_SEEDS}
    found = {
        variant: ranked_rows(profile, ranking, base=bench.base, source=source, seed=seed)
        for variant, (ranking, seed) in wanted.items()
    }
    widths = {module.name: module.in_features for module in channel_modules(bench.base, profile.localize.include)}
    most = sum(widths[module] * len(rows) for module, rows in found["own"].items())
    for other in bench.manifests:
        if name_of(other) != name:
            rows = {module: delta.rows for module, delta in stored_deltas(bench, other).items() if module in widths}
            found[other] = at_most(most, rows, widths)
    return found


def _drawn(seed: int) -> str:
    return f"random {seed}"


def at_most(parameters: int, rows: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """As many of the rows, by chance, as have so many parameters together."""
    every = [(module, row) for module in sorted(rows) for row in rows[module].tolist()]
    random.Random(0).shuffle(every)
    kept: dict[str, list[int]] = {}
    for module, row in every:
        parameters -= widths[module]
        if parameters < 0:
            break
        kept.setdefault(module, []).append(row)
    return {module: torch.tensor(sorted(chosen), dtype=torch.int32) for module, chosen in kept.items()}


def _halved(bench: Bench, sources: Mapping[str, Path], names: tuple[str, str]) -> Figure:
    """Half of both abilities' whole differences, which is the mean of both source models, on both own tasks."""
    found: Figure = {}
    for name in names:
        questions = bench.own(name)
        base, whole = bench.measure("", questions), bench.measure("", questions, model=sources[name])
        halved = bench.measure_mean(
            f"half of {' and half of '.join(names)}", [sources[each] for each in names], questions
        )
        found[name] = [
            {
                **asked(question),
                "base": scored(base[task]),
                "source": scored(whole[task]),
                "halved": scored(halved[task]),
                "share_kept": gain_kept(base[task], whole[task], halved[task]),
            }
            for question in questions
            for task in (question.task.name,)
        ]
    return found
