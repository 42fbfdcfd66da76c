"""`act-serve eval`: scores a base with a composition of abilities on a task file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from act_serve.errors import RequestError

if TYPE_CHECKING:
    from act_serve.models.examples import Example

TaskArgument = Annotated[
    Path | None, typer.Argument(help='JSONL of {"prompt", "answer"}, also with "choices", or {"text"}.')
]
AbilitiesOption = Annotated[str, typer.Option("--abilities", "-a", help="Composition such as fr+extract*0.5.")]
BaseOption = Annotated[str, typer.Option("--base", help="`embedded`, a model folder or a hub id.")]
StoreOption = Annotated[str, typer.Option("--store", help="Folder or URL of the ability store.")]
METRICS = "exact_match, json_fields, final_number, choice_accuracy, chrf, language_share, nll, perplexity; repeatable."
MetricOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help=METRICS,
    ),
]
LanguageOption = Annotated[str | None, typer.Option("--language", help="Language that language_share looks for.")]
ItemsOption = Annotated[int | None, typer.Option("--items", min=1, help="Only the first N examples.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length at which answers are cut.")]
HarnessOption = Annotated[
    str | None, typer.Option("--lm-eval", help="In place of a task file: tasks of lm-evaluation-harness, with commas.")
]
IncludeOption = Annotated[
    Path | None, typer.Option("--lm-eval-include", exists=True, file_okay=False, help="Folder with more such tasks.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file.")]


def evaluate(
    task: TaskArgument = None,
    abilities: AbilitiesOption = "",
    base: BaseOption = "embedded",
    store: StoreOption = "abilities",
    metric: MetricOption = None,
    language: LanguageOption = None,
    items: ItemsOption = None,
    max_new_tokens: TokensOption = 96,
    lm_eval: HarnessOption = None,
    lm_eval_include: IncludeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Score a base with abilities on a task file. Without --metric, the examples say which metrics make sense."""
    if (task is None) == (lm_eval is None):
        raise typer.BadParameter("give a task file, or --lm-eval with names of tasks")
    if json_file is not None:
        _check_writable(json_file)
    if lm_eval is not None:
        _harness(
            [name for name in lm_eval.split(",") if name], lm_eval_include, abilities, base, store, items, json_file
        )
        return
    assert task is not None
    from rich.console import Console
    from rich.table import Table

    from act_serve.pipeline.compose import score_composition
    from act_serve.pipeline.datasets.catalogue import read_examples
    from act_serve.pipeline.score_table import interval_text

    examples = read_examples(task)[:items]
    metrics = tuple(metric or _fitting(examples, language))
    with Console(stderr=True).status(f"scoring {len(examples)} examples"):
        scores = score_composition(
            base=base,
            composition=abilities,
            store=store,
            examples=examples,
            metrics=metrics,
            language=language,
            max_new_tokens=max_new_tokens,
        )
    table = Table(title=f"{task.name}: {base}{f' + {abilities}' if abilities else ''}, {len(examples)} examples")
    table.add_column("metric")
    table.add_column("score", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, found in scores.items():
        table.add_row(name, f"{found.score:.4g}", interval_text(found.interval))
    Console().print(table)
    if json_file is not None:
        result = {
            "task": task.name,
            "base": base,
            "abilities": abilities,
            "items": len(examples),
            "scores": {name: found.score for name, found in scores.items()},
            "intervals": {name: found.interval for name, found in scores.items()},
        }
        _write(json_file, result)


def _harness(
    tasks: list[str],
    include: Path | None,
    abilities: str,
    base: str,
    store: str,
    items: int | None,
    json_file: Path | None,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from act_serve.pipeline.harness import score_harness_tasks

    scores = score_harness_tasks(
        base=base, composition=abilities, store=store, tasks=tasks, include=include, items=items
    )
    table = Table("task", "metric", title=f"lm-evaluation-harness: {base}{f' + {abilities}' if abilities else ''}")
    for column in ("score", "standard error", "examples"):
        table.add_column(column, justify="right")
    for found in scores:
        stderr = "" if found.stderr is None else f"{found.stderr:.2g}"
        table.add_row(found.task, found.metric, f"{found.score:.4g}", stderr, str(found.items or ""))
    Console().print(table)
    if json_file is not None:
        result = {"base": base, "abilities": abilities, "lm_eval": [asdict(found) for found in scores]}
        _write(json_file, result)


def _check_writable(file: Path) -> None:
    """Raises RequestError when the file can't be written, before minutes are spent on what goes in there."""
    there = file.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a", encoding="utf-8").close()
        if not there:
            file.unlink()
    except OSError as exc:
        raise _unwritable(file, exc) from exc


def _write(file: Path, result: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as exc:
        raise _unwritable(file, exc) from exc


def _unwritable(file: Path, exc: OSError) -> RequestError:
    return RequestError(f"the scores can't be written to {file}: {exc.strerror}; give another file with --json")


def _fitting(examples: list["Example"], language: str | None) -> list[str]:
    if all(example.prompt is None for example in examples):
        return ["perplexity"]
    if all(example.choices for example in examples):
        return ["choice_accuracy"]
    if all(example.answer.startswith("{") for example in examples):
        return ["exact_match", "json_fields", "nll"]
    return ["chrf", "nll", *(["language_share"] if language else [])]
