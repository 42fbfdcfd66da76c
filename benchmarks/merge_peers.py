"""Merging methods against the composed sum, for `benchmarks/ability_peers.py --merge`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from act_serve.delta.artifact import ModuleDelta, as_stored, read_artifact, serialize_modules
from act_serve.models.loading import resolve_model
from act_serve.pipeline.compose import artifacts_of
from act_serve.pipeline.evaluate import Question
from act_serve.pipeline.measure import measure_items
from act_serve.pipeline.measured import difference
from act_serve.pipeline.merge import Share, merge_deltas
from act_serve.profile.schema import Profile
from benchmarks.ability_bench import Figure, figure, gain_kept, scored
from benchmarks.peer_results import Kept, Made

MERGES = ("sum", "mean", "ties", "dare", "dare_ties")


def merges(
    composition: str,
    profiles: dict[str, Profile],
    questions: list[Question],
    store: Path,
    kept: Kept,
    *,
    density: float,
    seed: int,
) -> Figure:
    """Own tasks of the abilities under each merging method; `sum` is the composition as it is served."""
    base = resolve_model(next(iter(profiles.values())).base)
    parts = {path.parent.name: (read_artifact(path)[1], weight) for path, weight in artifacts_of(composition, store)}
    ready: dict[str, Callable[[], dict[str, ModuleDelta]]] = {
        **{f"{name} alone": lambda name=name: dict(parts[name][0]) for name in parts},  # type: ignore[misc]
        **{
            method: lambda method=method: merge_deltas(  # type: ignore[misc]
                [Share(deltas, weight, density) for deltas, weight in parts.values()], method, seed
            )
            for method in MERGES
        },
    }
    made = {"base": kept.get("base", lambda: Made(0, 0, measure_items(base, [], questions)))}
    for name, deltas in ready.items():
        made[name] = kept.get(name, lambda: _merged(base, deltas(), questions))  # noqa: B023
    return {
        name: {
            "bytes": found.stored_bytes,
            "parameters": found.parameters,
            "tasks": {
                task: {
                    **scored(result),
                    "share_kept": gain_kept(
                        made["base"].results[task], made[f"{_owner(profiles, task)} alone"].results[task], result
                    ),
                    "minus_sum": figure(*difference(result, made["sum"].results[task])),
                }
                for task, result in found.results.items()
            },
        }
        for name, found in made.items()
    }


def _merged(base: Path, deltas: dict[str, ModuleDelta], questions: list[Question]) -> Made:
    size = len(serialize_modules(deltas, "bfloat16"))
    parameters = sum(each.delta.numel() for each in deltas.values())
    return Made(size, parameters, measure_items(base, [as_stored(deltas, "bfloat16")], questions))


def _owner(profiles: dict[str, Profile], task: str) -> str:
    return next(name for name, profile in profiles.items() if task in {each.name for each in profile.score})
