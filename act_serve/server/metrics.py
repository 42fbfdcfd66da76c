"""The router's own metrics, and the engines' beside them on one page in Prometheus' text format.

Names follow https://prometheus.io/docs/practices/naming; no client can add a label:
paths come from a fixed set (:mod:`act_serve.server.paths`), abilities from the catalogue.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

_DECISION_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_FIRST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
# An ability is a label of two histograms, so a large store must not become as many time series.
_MAX_ABILITIES = 50
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{)?(.*)$", re.DOTALL)


class RouterMetrics:
    """One router's counters, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # a time of birth beside every counter doubles the page and serves nobody
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "act_requests_total", "Requests answered, by path and status.", ["path", "status"], registry=self._registry
        )
        self.in_flight = Gauge("act_requests_in_flight", "Requests being worked on.", registry=self._registry)
        self.waiting = Gauge("act_requests_waiting", "Requests that wait for an engine.", registry=self._registry)
        self.abilities = Counter(
            "act_ability_requests_total", "Requests served with an ability.", ["ability"], registry=self._registry
        )
        self.auto = Counter(
            "act_router_auto_total", "Choices by auto; 'none' is no ability.", ["ability"], registry=self._registry
        )
        self.decision = Histogram(
            "act_router_decision_seconds",
            "From the parsed body to the composition.",
            buckets=_DECISION_BUCKETS_S,
            registry=self._registry,
        )
        self.retries = Counter(
            "act_router_retries_total",
            "Replicas that failed before the first byte.",
            registry=self._registry,
        )
        self.disconnects = Counter(
            "act_router_disconnects_total", "Clients gone before the end of their answer.", registry=self._registry
        )
        self.rejections = Counter(
            "act_rejections_total", "Requests refused with 429, by reason: queue_full, rate_limit.", ["reason"],
            registry=self._registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "act_time_to_first_token_seconds", "From a streamed request's arrival to its first event, by ability.",
            ["ability"], buckets=_FIRST_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "act_time_between_tokens_seconds", "Between two events of a stream, by ability.",
            ["ability"], buckets=_BETWEEN_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self.tokens = Counter(
            "act_generated_tokens_total", "Tokens of answers, by ability; 'none' is the base alone.", ["ability"],
            registry=self._registry,
        )  # fmt: skip
        self._labels: set[str] = set()
        self.store_stale = Gauge(
            "act_store_stale_seconds", "Since when the ability store cannot be read; 0: it can.",
            registry=self._registry,
        )  # fmt: skip

    def label(self, ability: str) -> str:
        """The ability's name among the first fifty that were used here, else "other"."""
        if ability not in self._labels:
            if len(self._labels) >= _MAX_ABILITIES:
                return "other"
            self._labels.add(ability)
        return ability

    def text(self) -> str:
        """The page of this router alone."""
        return generate_latest(self._registry).decode()


def merge_pages(own: str, engines: Mapping[str, str]) -> str:
    """One page out of the router's and each engine replica's, whose samples get a label ``replica``.

    The format wants all samples of a metric together, so the engines' pages are merged metric by metric.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in engines.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                if line not in comments.setdefault(family, []):
                    comments[family].append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, replica))
    lines = [line for family in samples for line in (*comments.get(family, []), *samples[family])]
    return own + "".join(f"{line}\n" for line in lines)


def _labelled(sample: str, replica: str) -> str:
    match = _SAMPLE.match(sample)
    if match is None:
        return sample
    name, labelled, rest = match.groups()
    label = f'replica="{replica}"'
    return f"{name}{{{label},{rest}" if labelled and not rest.startswith("}") else _bare(name, label, rest, labelled)


def _bare(name: str, label: str, rest: str, labelled: str | None) -> str:
    return f"{name}{{{label}{rest if labelled else '}' + rest}"
