"""Writes an analysis as PNG files, JSON, and one HTML file that needs nothing else."""

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from act_serve import __version__
from act_serve.errors import BuildError
from act_serve.pipeline.analyze.analysis import Analysis
from act_serve.pipeline.analyze.subject import Subject

REPORT, NUMBERS = "report.html", "analysis.json"


def check_writable(folder: Path) -> None:
    """Raises BuildError when the folder can't be made or written, before hours are spent on what goes in there."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as exc:
        raise BuildError(f"the report can't be written to {folder}: {exc}; give another folder with --out") from exc


def write_report(analysis: Analysis, subjects: Sequence[Subject], folder: Path) -> Path:
    """Fills `folder` and returns the path of the HTML report in it; raises BuildError when it can't be written."""
    page = folder / REPORT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for finding in analysis.findings:
            if finding.picture is not None:
                (folder / finding.picture_name).write_bytes(finding.picture)
        (folder / NUMBERS).write_text(json.dumps(_numbers(analysis, subjects), indent=1) + "\n", encoding="utf-8")
        page.write_text(_html(analysis, subjects), encoding="utf-8")
    except OSError as exc:
        raise BuildError(f"the report could not be written to {folder}: {exc}; all measurements are kept") from exc
    return page


def _html(analysis: Analysis, subjects: Sequence[Subject]) -> str:
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=f"Analysis of {', '.join(subject.name for subject in subjects)}",
        facts=_facts(subjects),
        findings=analysis.findings,
        notes=analysis.notes,
        pictures={f.key: base64.b64encode(f.picture).decode() for f in analysis.findings if f.picture is not None},
    )


def _facts(subjects: Sequence[Subject]) -> list[tuple[str, ...]]:
    """Headings, then a line per ability."""
    headings = ("ability", "base", "ability model", "channels", "calibration examples", "ranking", "p")
    lines = []
    for each in subjects:
        profile, settings = each.job.profile, each.job.profile.localize
        source = profile.source.model or "trained from the base on the profile's data"
        numbers = (f"{sum(each.channels.values()):,}", str(len(each.calibration)))
        lines.append((each.name, profile.base, source, *numbers, settings.ranking, f"{100 * settings.p:g} %"))
    return [headings, *lines]


def _numbers(analysis: Analysis, subjects: Sequence[Subject]) -> dict[str, Any]:
    headings, *lines = _facts(subjects)
    return {
        "act_serve": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "abilities": [dict(zip(headings, line, strict=True)) for line in lines],
        "verdicts": {f.key: f.verdict for f in analysis.findings if f.verdict is not None},
        "notes": analysis.notes,
        "records": {part: [_plain(record) for record in records] for part, records in analysis.records.items()},
    }


def _plain(value: Any) -> Any:
    """Records as JSON: keys become strings, numbers keep six significant digits."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
