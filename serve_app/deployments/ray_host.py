"""What a Decider is given in a process of Ray: the embedded Valkey, Ray's metrics, stages in other deployments."""

import logging
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from serve_app.config import RouterSettings
from serve_app.decider import local_stages
from serve_app.deployments.embedded_redis import resolve_redis_url
from serve_app.deployments.stages import RemoteIndex, RemotePrompts, graph_handle, remote_tokenize
from serve_app.index.mirror import Mirror
from serve_app.indexer import IndexStage, PromptStage
from serve_app.metric_table import Kind, Metric
from serve_app.metrics import Record


class RayInstruments:
    """In the Ray dashboard, and on every node's Prometheus endpoint with prefix `ray_`."""

    def __init__(self, model: str) -> None:
        self._model = model

    def make(self, metric: Metric) -> Record:
        labels = ("model", *metric.labels)
        made: Counter | Gauge | Histogram
        match metric.kind:
            case Kind.COUNTER:
                made = Counter(metric.name, metric.text, tag_keys=labels)
            case Kind.GAUGE:
                made = Gauge(metric.name, metric.text, tag_keys=labels)
            case Kind.HISTOGRAM:
                made = Histogram(metric.name, metric.text, boundaries=list(metric.bounds), tag_keys=labels)
        made.set_default_tags({"model": self._model})
        return _Record(made)


class _Record:
    def __init__(self, made: Counter | Gauge | Histogram) -> None:
        self._made = made
        self._record = made.inc if isinstance(made, Counter) else made.set if isinstance(made, Gauge) else made.observe

    def __call__(self, value: float, labels: Mapping[str, str]) -> None:
        self._record(value, dict(labels))

    def forget(self, labels: Mapping[str, str]) -> None:
        """Ray can take nothing away. A gauge goes by itself when it is not set; until then it is 0."""
        if isinstance(self._made, Gauge):
            self._made.set(0.0, dict(labels))


class RayHost:
    """What a decider needs of its surroundings, in a Ray process."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self.logger = logging.getLogger("ray.serve")

    def redis_url(self) -> str:
        return resolve_redis_url(self._settings.redis_url)

    def instruments(self) -> RayInstruments:
        return RayInstruments(self._settings.model)

    def stages(self, mirror: Mirror) -> tuple[PromptStage, IndexStage]:
        """In this process, or where the settings say so in the graph's deployments."""
        settings = self._settings
        tokenize = None
        if settings.tokenization == "deployment":
            tokenize = remote_tokenize(graph_handle("Tokenizer", settings.graph_app))
        prompts, index = local_stages(settings, mirror, tokenize)
        return (
            RemotePrompts(graph_handle("PrefixStore", settings.graph_app))
            if settings.prefix_lookup == "deployment"
            else prompts,
            RemoteIndex(graph_handle("BlockIndex", settings.graph_app))
            if settings.index_query == "deployment"
            else index,
        )
