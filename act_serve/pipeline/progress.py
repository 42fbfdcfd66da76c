"""Shows a build on the terminal: the plan, a bar for each stage, the final table."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from act_serve.delta.manifest import Score
from act_serve.pipeline.measured import Interval
from act_serve.pipeline.plan import Plan
from act_serve.pipeline.score_table import score_table
from act_serve.pipeline.training import Report


class Screen:
    """What the user sees of a build; give it a quiet console to see nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def show_plan(self, name: str, plan: Plan) -> None:
        """Prints the stages with their expected times, and the memory that the largest of them needs."""
        table = Table(title=f"Building the ability {name}", title_justify="left")
        for heading in ("stage", "what", "about"):
            table.add_column(heading, justify="right" if heading == "about" else "left")
        for stage in plan.stages:
            table.add_row(stage.name, stage.what, _duration(stage.seconds))
        self.console.print(table)
        total = _duration(sum(stage.seconds for stage in plan.stages))
        memory = plan.peak_bytes / 2**30
        self.console.print(f"together about {total}, at most {memory:.1f} GiB of memory beside the libraries\n")

    def note(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, highlight=False)

    def warn(self, text: str) -> None:
        """Prints one line as a warning; the text is taken as it is."""
        self.note(f"[yellow]warning[/yellow]: {escape(text)}")

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Shows a bar while the stage runs; the yielded function moves it: steps done, steps in all, a remark."""
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[remark]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task(name, total=None, remark="")

            def report(done: int, total: int, remark: str) -> None:
                progress.update(bar, completed=done, total=total, remark=f"{done}/{total} {remark}")

            yield report

    def show_scores(self, name: str, scores: Sequence[Score], intervals: Mapping[str, Interval]) -> None:
        """Prints base, source, transfer alone and final delta of every task, the delta with its interval."""
        self.console.print(score_table(f"{name} on held-out data", scores, intervals))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
