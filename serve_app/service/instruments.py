"""What is measured, by Prometheus' own client: for a process that Ray knows nothing of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from serve_app.metric_table import Kind, Metric
from serve_app.metrics import Record


class PrometheusInstruments:
    """Args: made: of the process; several models share it."""

    def __init__(self, model: str, made: Registered) -> None:
        self._model = model
        self._made = made

    def make(self, metric: Metric) -> Record:
        return _Record(self._model, self._made.get(metric), metric)


class _Record:
    def __init__(self, model: str, made: Counter | Gauge | Histogram, metric: Metric) -> None:
        self._model, self._made, self._names = model, made, metric.labels

    def __call__(self, value: float, labels: Mapping[str, str]) -> None:
        made = self._made.labels(*self._values(labels))
        if isinstance(made, Counter):
            made.inc(value)
        elif isinstance(made, Gauge):
            made.set(value)
        else:
            made.observe(value)

    def forget(self, labels: Mapping[str, str]) -> None:
        with contextlib.suppress(KeyError):  # it was never shown
            self._made.remove(*self._values(labels))

    def _values(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        return (self._model, *(labels[name] for name in self._names))


class Registered:
    """The metrics of one process, each once, whichever model asks for it first."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._by_name: dict[str, Counter | Gauge | Histogram] = {}

    def get(self, metric: Metric) -> Counter | Gauge | Histogram:
        if metric.name not in self._by_name:
            self._by_name[metric.name] = self._new(metric)
        return self._by_name[metric.name]

    def _new(self, metric: Metric) -> Counter | Gauge | Histogram:
        name, text, labels = metric.name, metric.text, ("model", *metric.labels)
        match metric.kind:
            case Kind.COUNTER:
                return Counter(name, text, labels, registry=self._registry)
            case Kind.GAUGE:
                return Gauge(name, text, labels, registry=self._registry)
            case Kind.HISTOGRAM:
                return Histogram(name, text, labels, registry=self._registry, buckets=tuple(metric.bounds))

    def show(self, metric: Metric, counts: Mapping[str, int]) -> None:
        """A counter of one label whose values are kept elsewhere, and read when somebody asks."""
        self._registry.register(_Counts(metric, counts))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Counts(Collector):
    def __init__(self, metric: Metric, counts: Mapping[str, int]) -> None:
        self._metric = metric
        self._counts = counts

    def collect(self) -> Iterable[Family]:
        family = CounterMetricFamily(self._metric.name, self._metric.text, labels=self._metric.labels)
        for kind, count in dict(self._counts).items():
            family.add_metric([kind], count)
        return [family]
