"""A server's ``/metrics`` as numbers."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from act_serve.errors import EngineError

# https://prometheus.io/docs/instrumenting/exposition_formats; a time behind the value is not written here.
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_TIMEOUT_S = 10.0

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """One reading.

    Attributes:
        at_s: when, in seconds that never go back.
        samples: labels and value of every sample, by metric.
    """

    at_s: float
    samples: Mapping[str, list[tuple[Labels, float]]] = field(default_factory=dict)

    def sum(self, metric: str, where: Callable[[Labels], bool] = lambda _: True) -> float:
        """Over the samples of ``metric`` whose labels ``where`` accepts; 0 where there are none."""
        return sum(value for labels, value in self.samples.get(metric, ()) if where(labels))

    def values(self, metric: str, label: str) -> list[str]:
        """The values that ``label`` has among the samples of ``metric``, sorted."""
        return sorted({labels[label] for labels, _ in self.samples.get(metric, ()) if label in labels})


def parse_metrics(text: str, at_s: float) -> MetricsPage:
    """Reads Prometheus' text format; lines that are none of its samples are left out."""
    samples: dict[str, list[tuple[Labels, float]]] = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match is not None:
            name, labels, value = match.groups()
            samples.setdefault(name, []).append((dict(_LABEL.findall(labels or "")), float(value)))
    return MetricsPage(at_s, samples)


def fetch_metrics(url: str, key: str | None) -> MetricsPage:
    """The page of a running server.

    Raises:
        EngineError: nothing answers at ``url`` with metrics, or it wants another key.
    """
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/metrics")
        if key:
            request.add_unredirected_header("authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            return parse_metrics(reply.read().decode(), time.monotonic())
    except urllib.error.HTTPError as exc:
        hint = "; give a key with --key or ACT_SERVE_KEY" if exc.code in (401, 403) else ""
        raise EngineError(f"{url} shows no metrics (status {exc.code}){hint}") from exc
    except (OSError, ValueError) as exc:
        raise EngineError(f"{url} shows no metrics ({exc}); is it the address of an act-serve server?") from exc
