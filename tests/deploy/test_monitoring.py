"""Alerts and dashboard ask only for metrics that routers or vLLM's engines really have."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from act_serve.engine.metrics import AbilityMetrics
from act_serve.engine.seats import Seats
from act_serve.server.metrics import RouterMetrics
from tests.deploy.manifests import DEPLOY, MONITORING, documents, ray_service

_OF_ENGINES = re.compile(r"vllm:|act_resident_|act_ability_(?:load|evict)|act_compositions_")
_METRIC = re.compile(r"\b(?:act_|vllm:)\w+")
_DEFINED = re.compile(r'self\._(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"')
_SUFFIXES = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


async def _stays(key: str) -> None: ...


def own_metrics() -> set[str]:
    page = RouterMetrics().text() + generate_latest(AbilityMetrics(Seats(1, _stays)).registry).decode()
    families = dict(line.split()[2:4] for line in page.splitlines() if line.startswith("# TYPE"))
    return {
        name + suffix for name, kind in families.items() for suffix in (("",) if kind == "counter" else _SUFFIXES[kind])
    }


def engine_metrics() -> set[str]:
    """From vLLM's source: importing it takes many seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed")
    text = (Path(spec.origin).parent / "v1/metrics/loggers.py").read_text()
    defined = {(kind, name) for kind, name in _DEFINED.findall(text)}
    return {name + suffix for kind, name in defined for suffix in _SUFFIXES[kind]}


def alerts() -> list[dict[str, Any]]:
    (rule,) = documents(MONITORING / "alerts.yaml")
    return [alert for group in rule["spec"]["groups"] for alert in group["rules"]]


def expressions() -> Iterator[str]:
    for alert in alerts():
        yield alert["expr"]
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def test_every_metric_exists() -> None:
    known = own_metrics() | engine_metrics()
    used = {metric for expression in expressions() for metric in _METRIC.findall(expression)}
    assert {"act_requests_total", "vllm:num_requests_waiting"} <= used
    assert used - known == set()


def test_every_expression_asks_for_this_job_and_is_balanced() -> None:
    for expression in expressions():
        for metric in re.findall(r"(?:act_|vllm:|up\{)\w*[^}]*\}?", expression):
            assert 'job="act-serve"' in metric, expression
        for left, right in ("()", "{}", "[]"):
            assert expression.count(left) == expression.count(right), expression


def test_engines_are_counted_once_though_every_router_shows_them() -> None:
    for expression in expressions():
        of_engines = len(_OF_ENGINES.findall(expression))
        if of_engines and not expression.startswith("absent("):
            assert expression.count("max by (replica") == of_engines, expression


def test_every_alert_is_in_the_run_book() -> None:
    book = (DEPLOY / "README.md").read_text()
    assert [alert["alert"] for alert in alerts() if f"`{alert['alert']}`" not in book] == []


def test_the_monitor_finds_the_port_of_the_engines() -> None:
    (monitor,) = documents(MONITORING / "pod-monitor.yaml")
    (group,) = ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    template = group["template"]
    assert monitor["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    assert template["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "act-serve"
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (ports[endpoint["port"]], endpoint["path"]) == (8000, "/metrics")
