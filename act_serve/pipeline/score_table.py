"""The table of an ability's scores, in the terminal."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.table import Table

from act_serve.delta.manifest import Score
from act_serve.pipeline.measured import Interval

HEADINGS = ("task", "metric", "items", "base", "source", "transfer", "delta", "change")


def score_table(title: str, scores: Sequence[Score], intervals: Mapping[str, Interval] | None = None) -> Table:
    """One row per task: base, source, transfer alone, final delta, and the delta's change against the base.

    The ability's own tasks come first; a line parts them from the retained ones. `intervals` are the delta's 95 %
    confidence intervals by task, where they are known.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 0))
    for heading in (*HEADINGS, *(["95 % interval"] if intervals else [])):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    ordered = sorted(scores, key=lambda score: score.retained)
    for index, score in enumerate(ordered):
        ends = index + 1 < len(ordered) and ordered[index + 1].retained and not score.retained
        figures = (_figure(value) for value in (score.base, score.source, score.transfer, score.delta))
        task = f"keeps {score.task}" if score.retained else score.task
        found = [interval_text((intervals or {}).get(score.task))] if intervals else []
        table.add_row(task, score.metric, str(score.items), *figures, _change(score), *found, end_section=ends)
    return table


def interval_text(interval: Interval | None) -> str:
    """Such as `41.2 to 44.1`; a dash where it is not known."""
    return "-" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _change(score: Score) -> str:
    if not score.base:
        return ""
    ratio = score.delta / score.base
    return f"x {ratio:.3g}" if ratio > 3 else f"{ratio - 1:+.1%}"
