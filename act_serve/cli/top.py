"""``act-serve top``: what a running server is doing, again and again."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from act_serve.cli.ability import KeyOption, abilities_of_server

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from act_serve.cli.metrics_page import MetricsPage

UrlOption = Annotated[str, typer.Option("--url", help="Address of the server.")]
IntervalOption = Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two readings.")]
OnceOption = Annotated[bool, typer.Option("--once", help="Print one frame, with totals instead of rates, and end.")]


def top(
    url: UrlOption = "http://127.0.0.1:8000",
    key: KeyOption = None,
    interval: IntervalOption = 2.0,
    once: OnceOption = False,
) -> None:
    """Watch a running server: requests, tokens, queues and abilities; Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    from act_serve.cli.metrics_page import fetch_metrics

    console = Console()
    page, abilities = fetch_metrics(url, key), abilities_of_server(url, key)
    if once:
        console.print(frame(url, page, None, abilities))
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
    try:
        with Live(frame(url, page, None, abilities), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                before, page = page, fetch_metrics(url, key)
                live.update(frame(url, page, before, abilities_of_server(url, key)), refresh=True)
    except KeyboardInterrupt:
        return


def frame(
    url: str, page: MetricsPage, before: MetricsPage | None, abilities: Sequence[Mapping[str, Any]]
) -> RenderableType:
    """What one reading shows; rates are those since ``before``, and left out without it."""
    from rich.console import Group

    return Group(_requests(url, page, before), _engines(page, before), _abilities(page, before, abilities))


def _requests(url: str, page: MetricsPage, before: MetricsPage | None) -> Table:
    from rich.table import Table

    table = Table("in flight", "requests", "per second", "429", "5xx", "retries", "clients gone", title=f"router {url}")
    table.add_row(
        f"{page.sum('act_requests_in_flight'):.0f}",
        f"{page.sum('act_requests_total'):.0f}",
        _rate(page, before, "act_requests_total"),
        f"{page.sum('act_requests_total', lambda labels: labels.get('status') == '429'):.0f}",
        f"{page.sum('act_requests_total', lambda labels: labels.get('status', '').startswith('5')):.0f}",
        f"{page.sum('act_router_retries_total'):.0f}",
        f"{page.sum('act_router_disconnects_total'):.0f}",
    )
    return table


def _engines(page: MetricsPage, before: MetricsPage | None) -> Table:
    from rich.table import Table

    replicas = page.values("vllm:num_requests_running", "replica")
    columns = ("engine", "running", "waiting", "KV cache", "tokens", "tokens/s", "prompt tokens", "prompt tokens/s")
    table = Table(*columns, title=f"{len(replicas)} engines" if replicas else "no engine answers")
    for replica in replicas:
        only = {"replica": replica}
        table.add_row(
            replica.rpartition("#")[2],
            f"{_of(page, 'vllm:num_requests_running', only):.0f}",
            f"{_of(page, 'vllm:num_requests_waiting', only):.0f}",
            f"{_of(page, 'vllm:kv_cache_usage_perc', only):.0%}",
            f"{_of(page, 'vllm:generation_tokens_total', only):.0f}",
            _rate(page, before, "vllm:generation_tokens_total", only),
            f"{_of(page, 'vllm:prompt_tokens_total', only):.0f}",
            _rate(page, before, "vllm:prompt_tokens_total", only),
        )
    return table


def _abilities(page: MetricsPage, before: MetricsPage | None, abilities: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("ability", "version", "status", "requests", "per second", title=f"{len(abilities)} abilities")
    for ability in abilities:
        only = {"ability": str(ability["name"])}
        table.add_row(
            str(ability["name"]),
            str(ability["version"]),
            str(ability["status"]),
            f"{_of(page, 'act_ability_requests_total', only):.0f}",
            _rate(page, before, "act_ability_requests_total", only),
        )
    return table


def _of(page: MetricsPage, metric: str, labels: Mapping[str, str]) -> float:
    return page.sum(metric, lambda found: labels.items() <= found.items())


def _rate(page: MetricsPage, before: MetricsPage | None, metric: str, labels: Mapping[str, str] | None = None) -> str:
    """Per second; a counter that fell belongs to a process that began again, and says nothing yet."""
    if before is None or page.at_s <= before.at_s:
        return "–"
    grown = _of(page, metric, labels or {}) - _of(before, metric, labels or {})
    return f"{grown / (page.at_s - before.at_s):.1f}" if grown >= 0 else "–"
