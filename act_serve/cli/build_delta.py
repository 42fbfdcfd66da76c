"""`act-serve build-delta`: from profiles to published abilities."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from act_serve.profile.schema import Profile

ProfilesArgument = Annotated[list[Path], typer.Argument(help="Ability profiles, built one after the other.")]
StoreOption = Annotated[str, typer.Option("--store", help="Folder or URL of the ability store to publish into.")]
WorkOption = Annotated[
    Path | None, typer.Option("--work", help="Folder of the unfinished builds. Default: builds/ under $ACT_SERVE_HOME.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")]
RayOption = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="Build all at once on a Ray cluster, one per GPU or share of the CPUs: on $RAY_ADDRESS, a cluster that "
        "runs here, or a Ray of its own. --store and --work (or $ACT_SERVE_HOME) must be on storage that all its "
        "machines share under the same path.",
    ),
]
RayAddressOption = Annotated[
    str | None, typer.Option("--ray-address", help="Ray cluster, HOST:PORT or `local`; means --ray.")
]
KeepOption = Annotated[
    float | None,
    typer.Option(
        "--keep",
        min=0.01,
        max=1.0,
        help="Find the smallest share of channels that keeps this share of the source model's gain, such as 0.95.",
    ),
]
PlanOption = Annotated[bool, typer.Option("--plan", help="Only show the plan.")]


def build_delta(
    profiles: ProfilesArgument,
    store: StoreOption = "abilities",
    work: WorkOption = None,
    threads: ThreadsOption = None,
    plan: PlanOption = False,
    keep: KeepOption = None,
    ray: RayOption = False,
    ray_address: RayAddressOption = None,
) -> None:
    """Build abilities from their profiles and publish them in the store.

    `accelerate launch $(which act-serve) build-delta PROFILE` trains the rows on several GPUs.
    An interrupted build goes on where it stopped. Nothing is published when an ability costs a retained task more
    than its profile allows, or keeps less of the source model's gain than --keep asks for: on validation data, or on
    the test examples beyond their confidence interval.
    """
    from act_serve.pipeline.processes import count, is_first
    from act_serve.profile.load import load_profile

    if count() > 1 and (ray or ray_address or len(profiles) > 1):
        raise typer.BadParameter("several processes (accelerate launch) build one profile at a time, and without --ray")
    # All are checked before the first minute is spent.
    loaded = [_searching(load_profile(path), keep) for path in profiles]
    _require_build_extra()
    from rich.console import Console

    from act_serve.abilities.store import open_store
    from act_serve.home import cache_home
    from act_serve.pipeline.progress import Screen
    from act_serve.pipeline.run import build, show_plan

    _quieten(threads)
    builds = work or cache_home() / "builds"
    if (ray or ray_address) and not plan:
        from act_serve.cli.ray_builds import build_with_ray

        raise typer.Exit(build_with_ray(loaded, store=store, work=builds, address=ray_address))
    screen = Screen(Console(quiet=not is_first()))
    for profile in loaded:
        if plan:
            show_plan(profile, open_store(store), screen)
        else:
            build(profile, store=open_store(store), work=builds / profile.name, screen=screen)


def _searching(profile: "Profile", keep: float | None) -> "Profile":
    """The profile with the share to keep that the command line asks for; ProfileError where there is no such share."""
    from act_serve.errors import ProfileError
    from act_serve.profile.schema import Search

    if keep is None:
        return profile
    if profile.source.ability:
        raise ProfileError(
            f"{profile.name}: --keep asks for a share of a source model's gain, and this profile goes on from the "
            f"ability {', '.join(profile.source.ability)}, with its rows and no model; build it without --keep"
        )
    search = profile.search or Search()
    return profile.model_copy(update={"search": search.model_copy(update={"keep": keep})})


def _require_build_extra() -> None:
    from act_serve.errors import MissingExtraError

    for module in ("torch", "transformers", "sacrebleu", "lingua"):
        try:
            __import__(module)
        except ImportError as exc:
            raise MissingExtraError(module, "build") from exc


def _quieten(threads: int | None) -> None:
    """Leaves the terminal to our own progress bars, and takes the number of threads."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
