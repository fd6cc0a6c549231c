"""vLLM's `kv_connector_module_path`: LMCache's connector, its metrics made fit for Ray.

LMCache 0.5.6 leaves the buckets of its one histogram to the Prometheus client. Ray's metrics, which Ray Serve LLM gives
to vLLM in that client's place, have no default, and the engine would not start.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector as _LMCacheMPConnector
from prometheus_client import Histogram

LOOKUP_BUCKETS_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]


class LMCacheMPConnector(_LMCacheMPConnector):  # type: ignore[misc]
    """The same, under the same name."""

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, metric_types: Mapping[Any, Any], *args: Any, **kwargs: Any) -> Any:
        types = {**metric_types, Histogram: partial(metric_types[Histogram], buckets=LOOKUP_BUCKETS_S)}
        return super().build_prom_metrics(vllm_config, types, *args, **kwargs)
