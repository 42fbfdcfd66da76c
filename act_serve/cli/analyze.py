"""`act-serve analyze`: the paper's findings on the user's own models, as pictures and tables."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from act_serve.pipeline.analyze.analysis import Part
    from act_serve.profile.schema import Ranking

ProfilesArgument = Annotated[list[Path], typer.Argument(help="Ability profiles of one base.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for report.html, analysis.json and the PNG files.")]
SharesOption = Annotated[
    str, typer.Option("--p", help="Shares of the parameters to measure at, with commas between them.")
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option("--skip", help="concentration, disentanglement, sufficiency, stability, layers; may be repeated."),
]
RankingOption = Annotated[
    list[str] | None,
    typer.Option("--ranking", help="Rankings to compare by; may be repeated. Default: all that fit in memory."),
]
FinetuneOption = Annotated[bool, typer.Option("--finetune/--no-finetune", help="Sufficiency after fine-tuning too.")]
ItemsOption = Annotated[int | None, typer.Option("--items", min=1, help="At most N test examples per task.")]
WorkOption = Annotated[
    Path | None, typer.Option("--work", help="Folder of the builds' stages. Default: builds/ under $ACT_SERVE_HOME.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")]


def analyze(
    profiles: ProfilesArgument,
    out: OutOption = Path("analysis"),
    shares: SharesOption = "0.01,0.02,0.05,0.1",
    skip: SkipOption = None,
    ranking: RankingOption = None,
    finetune: FinetuneOption = True,
    items: ItemsOption = None,
    work: WorkOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Show on your own models where abilities lie: concentrated, disentangled, sufficient, stable, or not.

    Uses what build-delta kept of the same profiles, and keeps its own measurements: an interrupted analysis goes on
    where it stopped. Sufficiency takes longest: it transfers, trains and scores at every p, with random rows beside.
    """
    from act_serve.cli.build_delta import _quieten, _require_build_extra
    from act_serve.profile.load import load_profile

    at, loaded = _shares(shares), [load_profile(path) for path in profiles]
    _require_build_extra()
    from rich.console import Console
    from rich.markup import escape

    from act_serve.home import cache_home
    from act_serve.pipeline.analyze.analysis import Options, refuse_impossible
    from act_serve.pipeline.analyze.analysis import analyze as run
    from act_serve.pipeline.analyze.report import check_writable, write_report
    from act_serve.pipeline.analyze.subject import open_subjects, refuse_unfit
    from act_serve.pipeline.progress import Screen
    from act_serve.pipeline.work_lock import alone_in

    options = Options(at, _parts(skip or []), _rankings(ranking or []), finetune, items)
    refuse_impossible(loaded, options)
    refuse_unfit(loaded)
    _quieten(threads)
    check_writable(out)
    console, builds = Console(), work or cache_home() / "builds"
    with ExitStack() as stack:
        for name in sorted({profile.name for profile in loaded}):  # in one order, so that no two wait for each other
            stack.enter_context(alone_in(builds / name, lambda said: console.print(escape(said))))
        subjects = open_subjects(loaded, builds, Screen(console))
        found = run(subjects, options)
        page = write_report(found, subjects, out)
    for finding in found.findings:
        if finding.verdict is not None:
            console.print(f"[bold]{finding.title}[/bold]: {finding.verdict}. {finding.sentences[1]}", highlight=False)
    for note in found.notes:
        console.print(f"[bold]Note[/bold]: {escape(note)}", highlight=False)
    console.print(f"\nreport: {page}", highlight=False)


def _shares(text: str) -> tuple[float, ...]:
    """`0.01,0.05` as numbers; a usage error for anything that is no share."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(0.0 < share <= 1.0 for share in found):
        raise typer.BadParameter(f"{text!r}: give shares above 0 and up to 1 such as 0.01,0.05", param_hint="--p")
    return found


def _rankings(names: list[str]) -> "tuple[Ranking, ...]":
    """The rankings asked for; a usage error for an unknown one."""
    from act_serve.pipeline.analyze.analysis import COMPARED

    if unknown := [name for name in names if name not in COMPARED]:
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {', '.join(COMPARED)}", param_hint="--ranking")
    return tuple(each for each in COMPARED if each in names)


def _parts(names: list[str]) -> "frozenset[Part]":
    """The parts to leave out; a usage error for an unknown one."""
    from act_serve.pipeline.analyze.analysis import PARTS

    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {', '.join(PARTS)}", param_hint="--skip")
    return frozenset(part for part in PARTS if part in names)
