"""What is measured, by Prometheus' own client: for a process that Ray knows nothing of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from serve_app.metrics import Record


class PrometheusInstruments:
    """Args: registry: of the process; several models share it."""

    def __init__(self, model: str, made: Registered) -> None:
        self._model = model
        self._made = made

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Record:
        made = self._made.get(name, lambda registry: Counter(name, text, ("model", *labels), registry=registry))
        return lambda value, tags: made.labels(**self._tags(tags)).inc(value)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Record:
        made = self._made.get(name, lambda registry: Gauge(name, text, ("model", *labels), registry=registry))
        return lambda value, tags: made.labels(**self._tags(tags)).set(value)

    def histogram(self, name: str, text: str, boundaries: Sequence[float], labels: Sequence[str] = ()) -> Record:
        made = self._made.get(
            name,
            lambda registry: Histogram(name, text, ("model", *labels), registry=registry, buckets=tuple(boundaries)),
        )
        return lambda value, tags: made.labels(**self._tags(tags)).observe(value)

    def _tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {"model": self._model, **tags}


class Registered:
    """The metrics of one process, each once, whichever model asks for it first."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._by_name: dict[str, object] = {}

    def get(self, name: str, make: Callable[[CollectorRegistry], object]):  # type: ignore[no-untyped-def]
        if name not in self._by_name:
            self._by_name[name] = make(self._registry)
        return self._by_name[name]

    def show(self, name: str, text: str, label: str, counts: Mapping[str, int]) -> None:
        """A counter whose values are kept elsewhere, and read when somebody asks."""
        self._registry.register(_Counts(name, text, label, counts))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Counts(Collector):
    def __init__(self, name: str, text: str, label: str, counts: Mapping[str, int]) -> None:
        self._described = name, text, label
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        name, text, label = self._described
        family = CounterMetricFamily(name, text, labels=[label])
        for kind, count in dict(self._counts).items():
            family.add_metric([kind], count)
        return [family]
