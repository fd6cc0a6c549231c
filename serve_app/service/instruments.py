"""What is measured, by Prometheus' own client: for a process that Ray knows nothing of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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

    def text(self) -> bytes:
        return generate_latest(self._registry)
