"""`act-serve eval`: scores a base with a composition of abilities on a task file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from act_serve.models.examples import Example

TaskArgument = Annotated[Path, typer.Argument(help='JSONL of {"prompt", "answer"}, also with "choices", or {"text"}.')]
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
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file.")]


def evaluate(
    task: TaskArgument,
    abilities: AbilitiesOption = "",
    base: BaseOption = "embedded",
    store: StoreOption = "abilities",
    metric: MetricOption = None,
    language: LanguageOption = None,
    items: ItemsOption = None,
    max_new_tokens: TokensOption = 96,
    json_file: JsonOption = None,
) -> None:
    """Score a base with abilities on a task file. Without --metric, the examples say which metrics make sense."""
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
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _fitting(examples: list["Example"], language: str | None) -> list[str]:
    if all(example.prompt is None for example in examples):
        return ["perplexity"]
    if all(example.choices for example in examples):
        return ["choice_accuracy"]
    if all(example.answer.startswith("{") for example in examples):
        return ["exact_match", "json_fields", "nll"]
    return ["chrf", "nll", *(["language_share"] if language else [])]
