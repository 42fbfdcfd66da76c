"""Several builds on a Ray cluster, as a user sees them: one line each, then what became of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from act_serve.profile.schema import Profile
    from act_serve.server.ray_build_task import Outcome
    from act_serve.server.ray_builds import Progress


def build_with_ray(profiles: Sequence["Profile"], *, store: str | Path, work: Path, address: str | None) -> int:
    """Runs the builds and returns the worst of their exit codes; raises MissingExtraError without Ray."""
    from rich.console import Console

    from act_serve.errors import MissingExtraError

    try:
        from act_serve.server.ray_builds import build_on_ray
    except ImportError as exc:
        raise MissingExtraError("ray", "serve") from exc
    console = Console()
    with _Lines(console) as lines:
        outcomes = build_on_ray(profiles, store=store, work=work, address=address, show=lines.show)
    _tell(console, outcomes, work)
    return max(outcome.exit_code for outcome in outcomes)


class _Lines:
    """One line per build: kept up to date on a terminal, repeated when a build has moved on in a log."""

    def __init__(self, console: "Console") -> None:
        from rich.live import Live

        self._console = console
        self._said: dict[str, str] = {}
        self._live = Live(console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> "_Lines":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, builds: Mapping[str, "Progress"]) -> None:
        """Shows where all builds are."""
        if self._live is not None:
            self._live.update(_table(builds))
            return
        for name, progress in builds.items():
            word = _word(progress)
            if self._said.get(name) != word:
                self._said[name] = word
                self._console.print(f"{name}: {word}", highlight=False, markup=False)


def _table(builds: Mapping[str, "Progress"]) -> "Table":
    from rich.table import Table

    table = Table(box=None)
    for name, progress in builds.items():
        table.add_row(f"[bold]{name}[/bold]", _word(progress))
    return table


def _word(progress: "Progress") -> str:
    outcome = progress.outcome
    if outcome is not None:
        return "failed" if outcome.exit_code else "published"
    again = f", attempt {progress.attempt} after its process died" if progress.attempt > 1 else ""
    where = f" (on {progress.node}{again})" if progress.node else ""
    return f"{progress.stage}{where}"


def _tell(console: "Console", outcomes: Sequence["Outcome"], work: Path) -> None:
    for outcome in outcomes:
        again = f" after {outcome.attempts} attempts" if outcome.attempts > 1 else ""
        if outcome.exit_code:
            console.print(f"✗ {outcome.name}: {outcome.message}", highlight=False, markup=False, style="red")
        else:
            console.print(f"✓ {outcome.name}: published in {outcome.folder}{again}", highlight=False, markup=False)
        console.print(f"  log: {work / outcome.name / 'build.log'}", highlight=False, markup=False)
