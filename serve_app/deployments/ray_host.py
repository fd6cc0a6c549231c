"""What a Decider is given in a process of Ray: the embedded Valkey, Ray's metrics, stages in other deployments."""

import logging
from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from serve_app.config import RouterSettings
from serve_app.decider import local_stages
from serve_app.deployments.embedded_redis import resolve_redis_url
from serve_app.deployments.stages import RemoteIndex, RemotePrompts, graph_handle, remote_tokenize
from serve_app.index.mirror import Mirror
from serve_app.indexer import IndexStage, PromptStage
from serve_app.metrics import Record


class RayInstruments:
    """In the Ray dashboard, and on every node's Prometheus endpoint with prefix `ray_`."""

    def __init__(self, model: str) -> None:
        self._tags = {"model": model}

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Record:
        record: Record = Counter(name, text, tag_keys=("model", *labels)).set_default_tags(self._tags).inc
        return record

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Record:
        record: Record = Gauge(name, text, tag_keys=("model", *labels)).set_default_tags(self._tags).set
        return record

    def histogram(self, name: str, text: str, boundaries: Sequence[float], labels: Sequence[str] = ()) -> Record:
        made = Histogram(name, text, boundaries=list(boundaries), tag_keys=("model", *labels))
        record: Record = made.set_default_tags(self._tags).observe
        return record


class RayHost:
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
